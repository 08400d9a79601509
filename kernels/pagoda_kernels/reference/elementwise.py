"""Norm, gated activations and rotation in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import SWIGLU_ALPHA, SWIGLU_LIMIT


class ReferenceElementwise(KernelBackend):
    """What is computed for each number or each head by itself."""

    @override
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = x if residual is None else x + residual
        wide = stream.float()
        inverse_rms = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        if weight.dtype == torch.float32:
            return (wide * inverse_rms).mul_(weight).to(x.dtype), stream
        return (wide * inverse_rms).to(x.dtype).mul_(weight), stream

    @override
    def apply_rotary(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved)

    @override
    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @override
    def gelu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @override
    def clamped_swiglu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        gate = gate.clamp(max=SWIGLU_LIMIT)
        up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return (gate * torch.sigmoid(gate * SWIGLU_ALPHA) * (up + 1)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [T, heads, head_dim] by the angles of cos and sin, broadcastable to [T, heads, rotary_dim // 2]."""
    rotary_dim = 2 * cos.shape[-1]
    if not rotary_dim:
        return x.contiguous()
    rotated = x.float().clone()
    wide = x[..., :rotary_dim].float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        rotated_first, rotated_second = rotated[..., 0:rotary_dim:2], rotated[..., 1:rotary_dim:2]
    else:
        first, second = wide.chunk(2, dim=-1)
        rotated_first, rotated_second = rotated[..., :rotary_dim].chunk(2, dim=-1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated.to(x.dtype)
