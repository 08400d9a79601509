"""Greedy sampling and masks in torch. Drawing is the sampler's own torch code, which the GPU's kernel is tested against."""

from __future__ import annotations

import torch
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend


class ReferenceSampling(KernelBackend):
    """What samples without random numbers."""

    @override
    def soft_cap(self, logits: torch.Tensor, cap: float) -> None:
        logits.div_(cap).tanh_().mul_(cap)

    @override
    def greedy_sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best_logits, token_ids = logits.max(dim=-1)
        return token_ids, best_logits

    @override
    def apply_token_bitmask(self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
        bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
        forbidden = ((bitmask[:, :, None] >> bits) & 1).view(len(rows), -1) == 0
        masked = logits.index_select(0, rows)
        masked[:, : forbidden.shape[1]].masked_fill_(forbidden, float("-inf"))
        logits.index_copy_(0, rows, masked)
