"""What operations take and give besides tensors: a batch for attention, a packed weight, the inputs of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

PANEL = 32
"""Outputs that lie next to each other in a packed weight; the last panel is filled up with zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """A ragged batch of R requests with T query tokens, over paged keys and values.

    Row r's queries are tokens `query_start_loc[r] .. query_start_loc[r + 1] - 1` of the flattened batch, and they are the
    last ones of its `seq_lens[r]` tokens:

        row r, block size 4:   block_table[r] = [7, 3, 9, 0, 0]          (0: the null block, padding)
        positions               0 1 2 3 │ 4 5 6 7 │ 8 9 . .
        in block                   7    │    3    │    9
        seq_lens[r] = 10, and with 3 query tokens the queries are at positions 7, 8 and 9

    Attributes:
        query_start_loc: int32 [R + 1]; starts with 0, ends with T.
        seq_lens: int32 [R], at least 1; context length including this step's tokens.
        block_table: int32 [R, max_blocks]; entries past a row's last block are 0 and never influence a result.
        slot_mapping: int64 [T]; `block_id * block_size + offset` of the slot that a token's key and value go to. Padding
            tokens use slot 0, which is in the null block.
        max_query_len: largest query length of a row.
        max_seq_len: largest entry of `seq_lens`.
        num_decode_rows: the first that many rows have query length 1 (their tokens are the first `num_decode_rows` tokens).
        num_short_rows: that many rows after them have at most `KernelBackend.short_query_len` tokens, and go to a kernel for
            few tokens in long contexts; 0 where the backend has none.
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
    num_short_rows: int = 0
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out_features, in_features]` in panels of 32 outputs, P of them.

        float32    values float32  [P, in_features, 32]          values[p, k, c] = weight[32p + c, k]
        bfloat16   values bfloat16 [P, in_features / 2, 32, 2]   values[p, j, c, i] = weight[32p + c, 2j + i]
        int8       values uint8    [P, in_features / 4, 32, 4]   values[p, j, c, i] = q[32p + c, 4j + i] + 128
        int4       values uint8    [P, in_features / 8, 32, 4]   low  four bits: q[32p + c, 8j + i]
                                                                 high four bits: q[32p + c, 8j + 4 + i]

    Quantized weights have a scale for every output and every group of `group_size` consecutive inputs, G groups:
    `weight[n, k] = scales[k // group_size, n] * (stored - zeros[k // group_size, n])`, where `stored` is 0 .. 255 (int8, with
    the 128 in it) or 0 .. 15 (int4). `scales` float32 and `zeros` uint8 are `[G, 32 * P]`; zeros of None are 128, and 8.
    `in_features` must be even for bfloat16, a multiple of 4 for int8 and of 8 for int4, and so must `group_size`.
    """

    values: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    group_size: int = 0
    bits: int = 32

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.zeros) if tensor is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What a model reads of a step, for M rows of N tokens in all, on the model's device.

    Attributes:
        input_ids, positions, slot_mapping: contiguous int64 [N]; the mapping as in `AttentionMetadata`.
        seq_lens: contiguous int32 [M].
        block_table: int32 [M, columns]; rows may be parts of longer ones.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def allocate(cls, num_tokens: int, num_rows: int, num_columns: int, device: torch.device) -> StepTensors:
        """Tensors that hold nothing yet."""
        input_ids, positions, slot_mapping = torch.empty((3, num_tokens), dtype=torch.int64, device=device).unbind()
        return cls(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            seq_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
            block_table=torch.empty((num_rows, num_columns), dtype=torch.int32, device=device),
        )

    def part(self, num_rows: int, num_columns: int) -> StepTensors:
        """The first rows, of one token each, and the first columns of their block tables."""
        return StepTensors(
            input_ids=self.input_ids[:num_rows],
            positions=self.positions[:num_rows],
            slot_mapping=self.slot_mapping[:num_rows],
            seq_lens=self.seq_lens[:num_rows],
            block_table=self.block_table[:num_rows, :num_columns],
        )
