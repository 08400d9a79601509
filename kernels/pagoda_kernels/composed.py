"""Operations put together from others, for backends that have no kernel of their own for the whole."""

from __future__ import annotations

import torch

from pagoda_kernels.interface import ApplyRotary, RMSNorm, RotateAndStore, WriteKV


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
    ) -> torch.Tensor:
        if query_norm is not None and key_norm is not None:
            query, key = rms_norm(query, query_norm, eps, None)[0], rms_norm(key, key_norm, eps, None)[0]
        query, key = apply_rotary(query, key, cos, sin)
        write_kv(key, value, k_cache, v_cache, slot_mapping)
        return query

    return rotate_and_store
