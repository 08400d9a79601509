"""From the tables of all slots to what one step reads: token ids, positions, places in the KV cache, block tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_kernels import backend


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


def gather_step(
    token_pool: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    max_query_len: int,
    into: StepTensors,
) -> None:
    """Fill `into` with the tokens that R rows compute next.

    Row r computes the tokens from position `num_computed_tokens[r]` on, `query_start_loc[r + 1] - query_start_loc[r]` of them.
    Rows of `into` behind the R are padding: one token at position 0 of a context that has only the null block.

    Args:
        token_pool: contiguous int64 [slots, positions], the token ids of each slot.
        block_table: contiguous int32 [slots, blocks], the blocks of each slot.
        block_size: tokens a block.
        slots: int64 [R], the slot of each row.
        query_start_loc: int32 [R + 1] or longer, as in `AttentionMetadata`.
        num_computed_tokens: int64 [R].
        max_query_len: the largest number of tokens of a row.
        into: of M >= R rows and the R rows' tokens and M - R more.
    """
    backend.active.gather_step(
        token_pool, block_table, block_size, slots, query_start_loc, num_computed_tokens, max_query_len, into
    )
