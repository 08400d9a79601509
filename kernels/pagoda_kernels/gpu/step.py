"""Launching the gathering of a step's inputs."""

from __future__ import annotations

import torch
from typing_extensions import override

from pagoda_kernels.gpu.step_kernels import gather_step_kernel
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import StepTensors

# Tokens and columns a program looks at together: all of a decode row's up to contexts of 16,384 tokens in blocks of 16.
GATHER_TILE = 1024
GATHER_WARPS = 4


class TritonStep(KernelBackend):
    """The gathering of a step's inputs in one launch."""

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
        num_rows, num_columns = into.block_table.shape
        gather_step_kernel[(num_rows, -(-max(max_query_len, num_columns) // GATHER_TILE))](
            into.input_ids,
            into.positions,
            into.slot_mapping,
            into.seq_lens,
            into.block_table,
            token_pool,
            block_table,
            req_indices,
            query_start_loc,
            num_computed_tokens,
            token_pool.stride(0),
            block_table.stride(0),
            into.block_table.stride(0),
            len(req_indices),
            num_columns,
            block_size,
            GATHER_TILE,
            num_warps=GATHER_WARPS,
        )
