"""Launching norm, gated activation, and the way from the projection into the KV cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.elementwise_kernels import (
    gated_activation_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
    rotate_kernel,
)
from pagoda_kernels.interface import KernelBackend

ACTIVATION_TILE = 1024
ACTIVATION_WARPS = 4
ROTATE_WARPS = 4
# As `gated_activation_kernel` numbers them.
SILU, GELU, CLAMPED_SWIGLU = 0, 1, 2
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16


class TritonElementwise(KernelBackend):
    """Norm, gated activations, and the way from the projection into the KV cache, each in one launch."""

    @override
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = x.shape[-1]
        heads = x.shape[1] if x.dim() == 3 else 1
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        stream = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm_kernel[(x.numel() // size,)](
            normed,
            stream,
            x,
            x if residual is None else residual,
            weight,
            eps,
            x.stride(0),
            **rms_norm_constants(size, heads, has_residual=residual is not None),
            num_warps=rms_norm_warps(size),
        )
        return normed, stream

    @override
    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return _gated_activation(x, SILU)

    @override
    def gelu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return _gated_activation(x, GELU)

    @override
    def clamped_swiglu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return _gated_activation(x, CLAMPED_SWIGLU)

    @override
    def apply_rotary(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = _with_heads_together(query), _with_heads_together(key)
        rotated_query, rotated_key = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
        num_tokens, num_heads, head_dim = query.shape
        rotate_kernel[(num_tokens, 2)](
            rotated_query,
            rotated_key,
            query,
            key,
            cos,
            sin,
            query.stride(0),
            key.stride(0),
            **head_constants(num_heads, key.shape[1], head_dim, cos.shape[1], interleaved=interleaved),
            num_warps=ROTATE_WARPS,
        )
        return rotated_query, rotated_key

    @override
    def rotate_and_store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        eps: float,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_scales: tuple[float, float] | None = None,
        interleaved: bool = False,
    ) -> torch.Tensor:
        k_scale, v_scale = kv_scales or (1.0, 1.0)
        num_tokens, num_heads, head_dim = query.shape
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        rotate_and_store_kernel[(num_tokens, 3)](
            rotated,
            query,
            key,
            value,
            cos,
            sin,
            query if query_norm is None else query_norm,
            key if key_norm is None else key_norm,
            k_cache,
            v_cache,
            slot_mapping,
            eps,
            1.0 / k_scale,
            1.0 / v_scale,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            **rotate_constants(
                num_heads,
                key.shape[1],
                head_dim,
                k_cache.shape[2],
                has_norm=query_norm is not None,
                cache_dtype=k_cache.dtype,
                rotary_half=cos.shape[1],
                interleaved=interleaved,
            ),
            num_warps=ROTATE_WARPS,
        )
        return rotated


def _with_heads_together(x: torch.Tensor) -> torch.Tensor:
    """`x` [T, heads, head_dim], its heads one behind the other, tokens at any stride."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _gated_activation(x: torch.Tensor, activation: int) -> torch.Tensor:
    x = x.contiguous()
    size = x.shape[-1] // 2
    output = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    grid = (output.numel() // size, -(-size // ACTIVATION_TILE))
    gated_activation_kernel[grid](output, x, size, ACTIVATION_TILE, activation, num_warps=ACTIVATION_WARPS)
    return output


def rms_norm_constants(size: int, heads: int, *, has_residual: bool) -> dict[str, Any]:
    """The constants of `rms_norm_kernel`."""
    padded = triton.next_power_of_2(size)
    return {"HEADS": heads, "SIZE": size, "PADDED_SIZE": padded, "HAS_RESIDUAL": has_residual}


def rms_norm_warps(size: int) -> int:
    """Warps for vectors of `size` numbers: 16 numbers a thread, so that loads are whole sectors."""
    padded: int = triton.next_power_of_2(size)
    return min(_MAX_WARPS, max(1, padded // _ELEMENTS_PER_WARP))


def rotate_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    has_norm: bool,
    cache_dtype: torch.dtype,
    rotary_half: int,
    interleaved: bool = False,
) -> dict[str, Any]:
    """The constants of `rotate_and_store_kernel`."""
    return {
        **head_constants(num_heads, num_kv_heads, head_dim, rotary_half, interleaved=interleaved),
        "BLOCK_SIZE": block_size,
        "HAS_NORM": has_norm,
        "FLOAT8_MAX": torch.finfo(cache_dtype).max if cache_dtype.itemsize == 1 else 0.0,
    }


def head_constants(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_half: int, *, interleaved: bool
) -> dict[str, Any]:
    """The constants of `rotate_kernel`."""
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "PADDED_HEADS": triton.next_power_of_2(num_heads),
        "PADDED_KV_HEADS": triton.next_power_of_2(num_kv_heads),
        "HEAD_DIM": head_dim,
        "PADDED_HALF": triton.next_power_of_2(head_dim // 2),
        "ROTARY_HALF": rotary_half,
        "INTERLEAVED": interleaved,
    }
