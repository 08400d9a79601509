"""What attention needs to know about one step's batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """A ragged batch of R requests with T query tokens, over paged keys and values.

    Row r's queries are tokens `query_start_loc[r] .. query_start_loc[r + 1] - 1` of the flattened batch, and they are the
    last ones of its `seq_lens[r]` tokens:

        row r, block size 4:   block_table[r] = [7, 3, 9, 0, 0]          (0: the null block, padding)
        positions               0 1 2 3 │ 4 5 6 7 │ 8 9 . .
        in block                   7    │    3    │    9
        seq_lens[r] = 10, and with 3 query tokens the queries stand at positions 7, 8 and 9

    Attributes:
        query_start_loc: int32 [R + 1]; starts with 0, ends with T.
        seq_lens: int32 [R], at least 1; context length including this step's tokens.
        block_table: int32 [R, max_blocks]; entries past a row's last block are 0 and never influence a result.
        slot_mapping: int64 [T]; `block_id * block_size + offset` of the slot that a token's key and value go to. Padding
            tokens use slot 0, which lies in the null block.
        max_query_len: largest query length of a row.
        max_seq_len: largest entry of `seq_lens`.
        num_decode_rows: the first that many rows have query length 1 (their tokens are the first `num_decode_rows` tokens).
        derived: values that an implementation works out from the others once a step and not once a layer. Metadata
            therefore belongs to one step: its tensors must not be changed after the first use.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
