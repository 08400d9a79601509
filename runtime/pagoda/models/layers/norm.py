"""Normalization layers."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, fused with the addition to the residual stream."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """The layer's one tensor; `prefix` is the layer's own."""
        return {f"{prefix}weight": WeightTarget.whole(self.weight)}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., size] to `(normed, new_residual)`, see `KernelBackend.rms_norm`."""
        return backend.active.rms_norm(x, self.weight, self.eps, residual)
