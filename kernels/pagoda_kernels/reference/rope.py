"""Torch twin of `pagoda_kernels.rope`."""

from __future__ import annotations

import torch


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pagoda_kernels.rope.apply_rotary`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated.to(x.dtype)
