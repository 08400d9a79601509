"""Operations put together from others, for backends that have no kernel of their own for the whole."""

from __future__ import annotations

import torch

from pagoda_kernels.interface import ApplyRotary, RMSNorm, RotateAndStore, WriteKV


def to_float8(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`x / scale` in the float8 type `dtype`: beyond its range its greatest number, else the nearest, of two the even one."""
    largest = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-largest, largest).to(dtype)


def compose_rotate_and_store(rms_norm: RMSNorm, apply_rotary: ApplyRotary, write_kv: WriteKV) -> RotateAndStore:
    """`pagoda_kernels.attention.rotate_and_store` as the three operations one after the other."""

    def rotate_and_store(
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
    ) -> torch.Tensor:
        if query_norm is not None and key_norm is not None:
            query, key = rms_norm(query, query_norm, eps, None)[0], rms_norm(key, key_norm, eps, None)[0]
        query, key = apply_rotary(query, key, cos, sin)
        if kv_scales is not None:
            # As bytes, which every operation knows how to move.
            key, value = (
                to_float8(x, cache_scale, k_cache.dtype).view(torch.uint8)
                for x, cache_scale in zip((key, value), kv_scales, strict=True)
            )
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        write_kv(key, value, k_cache, v_cache, slot_mapping)
        return query

    return rotate_and_store
