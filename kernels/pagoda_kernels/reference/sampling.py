"""Greedy sampling in torch. Drawing is the sampler's own torch code, which the GPU's kernel is tested against."""

from __future__ import annotations

import torch
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend


class ReferenceSampling(KernelBackend):
    """What samples without random numbers."""

    @override
    def greedy_sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best_logits, token_ids = logits.max(dim=-1)
        return token_ids, best_logits
