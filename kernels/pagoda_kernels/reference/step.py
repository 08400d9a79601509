"""The inputs of a step, gathered by torch."""

from __future__ import annotations

import torch
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import StepTensors


class ReferenceStep(KernelBackend):
    """The gathering of a step's inputs."""

    @override
    def gather_step(
        self,
        token_pool: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        req_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        max_query_len: int,
        into: StepTensors,
    ) -> None:
        num_rows = len(req_indices)
        starts = query_start_loc[: num_rows + 1].long()
        counts = starts.diff()
        num_tokens = len(into.input_ids) - (len(into.seq_lens) - num_rows)
        row_of_token = torch.repeat_interleave(counts, output_size=num_tokens)
        offsets = torch.arange(num_tokens, device=req_indices.device) - starts[row_of_token]
        positions = num_computed_tokens[row_of_token] + offsets
        index_of_token = req_indices[row_of_token]
        blocks = block_table[index_of_token, positions // block_size].long()
        for tensor, values in (
            (into.input_ids, token_pool[index_of_token, positions]),
            (into.positions, positions),
            (into.slot_mapping, blocks * block_size + positions % block_size),
        ):
            tensor[:num_tokens] = values
            tensor[num_tokens:] = 0
        into.seq_lens[:num_rows] = num_computed_tokens + counts
        into.seq_lens[num_rows:] = 1
        into.block_table[:num_rows] = block_table[req_indices, : into.block_table.shape[1]]
        into.block_table[num_rows:] = 0
