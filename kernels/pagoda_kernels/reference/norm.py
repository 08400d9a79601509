"""Torch twin of `pagoda_kernels.norm`."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pagoda_kernels.norm.rms_norm`."""
    stream = x if residual is None else x + residual
    wide = stream.float()
    inverse_rms = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse_rms).to(x.dtype).mul_(weight), stream
