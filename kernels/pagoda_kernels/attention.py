"""Attention over paged keys and values."""

from __future__ import annotations

import torch

from pagoda_kernels import backend
from pagoda_kernels.metadata import AttentionMetadata

__all__ = ["AttentionMetadata", "paged_attention", "rotate_and_store", "write_kv"]


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Causal softmax attention of every query token over its own request's context.

    The keys and values of this step's tokens must be in the cache already (`write_kv`). Scores and softmax are float32.
    Slots beyond a row's context, the null block included, never influence the result, whatever they hold (NaN too).

    Args:
        query: contiguous [T, num_heads, head_dim]; head h reads KV head `h // (num_heads // num_kv_heads)`.
        k_cache, v_cache: contiguous [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`, or float8.
        metadata: the batch.
        scale: factor of the scores, usually `head_dim ** -0.5`.
        sliding_window: a query at position p sees positions `p - sliding_window + 1 .. p`; None: all up to p.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)` before the softmax.
        kv_scales: of caches of float8, how many times their keys, and their values, count; None for other caches.

    Returns:
        [T, num_heads, head_dim], contiguous, dtype of `query`.
    """
    return backend.active.paged_attention(query, k_cache, v_cache, metadata, scale, sliding_window, soft_cap, kv_scales)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store keys and values [T, num_kv_heads, head_dim] in their slots of the caches, in place.

    Caches as in `paged_attention`; `slot_mapping` as in `AttentionMetadata`. Two tokens share a slot only if it is slot 0.
    """
    backend.active.write_kv(key, value, k_cache, v_cache, slot_mapping)


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
    """All that lies between the projection and attention: norm per head, rotation, and the way into the cache.

    Args:
        query: [T, num_heads, head_dim]; not changed. Like `key` and `value` [T, num_kv_heads, head_dim] it may be a view of
            one projection, in which heads follow each other without gaps.
        cos, sin: float32 [T, head_dim // 2], contiguous; see `pagoda_kernels.rope.apply_rotary`.
        query_norm, key_norm: weights [head_dim] of `pagoda_kernels.norm.rms_norm` over each head, with `eps`; None for models
            without: both or neither.
        k_cache, v_cache, slot_mapping: as in `write_kv`; the keys are stored rotated.
        kv_scales: as in `paged_attention`. Keys and values are divided by them, kept in the range of their float8 type, and
            rounded to nearest.

    Returns:
        The normalized and rotated query, contiguous.
    """
    return backend.active.rotate_and_store(
        query, key, value, cos, sin, query_norm, key_norm, eps, k_cache, v_cache, slot_mapping, kv_scales
    )
