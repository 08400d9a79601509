"""Launching the sampling kernels."""

from __future__ import annotations

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.sampling_kernels import greedy_kernel, sample_top_p_kernel, token_bitmask_kernel
from pagoda_kernels.interface import KernelBackend

# Logits a program looks at together, and its warps: 4 numbers a thread, so that two programs fit a multiprocessor.
SAMPLING_TILE = 2048
SAMPLING_WARPS = 16
BITMASK_TILE = 4096
BITMASK_WARPS = 8


class TritonSampling(KernelBackend):
    """One launch for the best tokens of all rows, one for all masks, one for all rows that draw from the whole vocabulary."""

    @override
    def soft_cap(self, logits: torch.Tensor, cap: float) -> None:
        # On a GPU torch computes every element alike, wherever it stands.
        logits.div_(cap).tanh_().mul_(cap)

    @override
    def greedy_sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, vocabulary = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        best_logits = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        greedy_kernel[(num_rows,)](
            token_ids, best_logits, logits, logits.stride(0), vocabulary, SAMPLING_TILE, num_warps=SAMPLING_WARPS
        )
        return token_ids, best_logits

    @override
    def sample_top_p_by_rejection(
        self,
        logits: torch.Tensor,
        best_logits: torch.Tensor,
        rows: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        inverse_temperature: torch.Tensor,
        min_p: torch.Tensor,
        top_p: torch.Tensor,
    ) -> torch.Tensor:
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        sample_top_p_kernel[(len(rows),)](
            token_ids,
            rows,
            logits,
            best_logits,
            seeds,
            positions,
            inverse_temperature,
            min_p,
            top_p,
            logits.stride(0),
            logits.shape[1],
            SAMPLING_TILE,
            num_tiles(logits.shape[1]),
            num_warps=SAMPLING_WARPS,
        )
        return token_ids

    @override
    def apply_token_bitmask(self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
        num_rows, num_words = bitmask.shape
        grid = (num_rows, triton.cdiv(32 * num_words, BITMASK_TILE))
        token_bitmask_kernel[grid](
            logits, rows, bitmask, logits.stride(0), num_words, BITMASK_TILE, num_warps=BITMASK_WARPS
        )


def num_tiles(vocabulary: int) -> int:
    """The tiles of a row, rounded up to a power of two."""
    rounded: int = triton.next_power_of_2(-(-vocabulary // SAMPLING_TILE))
    return rounded
