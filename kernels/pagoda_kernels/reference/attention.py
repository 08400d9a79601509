"""Attention over paged keys and values in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference.attention_plan import CacheGeometry, DecodeGroup, PrefillRow, plan_attention
from pagoda_kernels.types import AttentionMetadata


class ReferenceAttention(KernelBackend):
    """What reads and writes the KV cache."""

    @override
    def paged_attention(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        kv_scales: tuple[float, float] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kv_scales is not None:
            # The types of queries hold every number of a float8 type.
            keys, values = k_cache.to(query.dtype), v_cache.to(query.dtype)
            k_scale, v_scale = kv_scales
            attended = self.paged_attention(
                query, keys, values, metadata, scale * k_scale, sliding_window, soft_cap, None, sinks
            )
            return attended.mul_(v_scale)
        geometry = CacheGeometry.of(k_cache)
        plan = plan_attention(metadata, geometry, sliding_window)
        k_pages = k_cache.view(-1, geometry.block_size * geometry.head_dim)
        v_pages = v_cache.view(-1, geometry.block_size * geometry.head_dim)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in plan.decode:
            keys, values = _gather_group(k_pages, v_pages, group, geometry, plan.workspace)
            # The query heads of a KV head become its query positions, so that keys and values are read once for all of them.
            grouped = query[group.rows].view(group.num_rows, geometry.num_kv_heads, -1, geometry.head_dim)
            own_sinks = None if sinks is None else sinks.view(1, geometry.num_kv_heads, -1)
            attended = _attend(grouped, keys, values, group.mask, scale, soft_cap, own_sinks)
            output[group.rows] = attended.flatten(1, 2)
        for row in plan.prefill:
            _prefill(query, k_pages, v_pages, row, geometry, scale, soft_cap, sinks, output)
        return output

    @override
    def latent_attention(
        self, query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float, rank: int
    ) -> torch.Tensor:
        return self.paged_attention(query, cache, cache, metadata, scale)[..., :rank].contiguous()

    @override
    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        block_size = k_cache.shape[2]
        blocks = slot_mapping // block_size
        offsets = slot_mapping - blocks * block_size
        k_cache[blocks, :, offsets] = key
        v_cache[blocks, :, offsets] = value

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
        if query_norm is not None and key_norm is not None:
            query, key = self.rms_norm(query, query_norm, eps)[0], self.rms_norm(key, key_norm, eps)[0]
        query, key = self.apply_rotary(query, key, cos, sin, interleaved)
        if kv_scales is not None:
            # As bytes, which every torch operation can move.
            key, value = (
                to_float8(x, cache_scale, k_cache.dtype).view(torch.uint8)
                for x, cache_scale in zip((key, value), kv_scales, strict=True)
            )
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        self.write_kv(key, value, k_cache, v_cache, slot_mapping)
        return query


def to_float8(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`x / scale` in the float8 type `dtype`: beyond its range its greatest number, else the nearest, of two the even one."""
    largest = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-largest, largest).to(dtype)


def _gather_group(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    group: DecodeGroup,
    geometry: CacheGeometry,
    workspace: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the group's rows, each [C, num_kv_heads, num_keys, head_dim], in `workspace`."""
    gathered = workspace.view(-1)[: 2 * group.pages.numel() * workspace.shape[2]].view(2, -1, workspace.shape[2])
    torch.index_select(k_pages, 0, group.pages, out=gathered[0])
    torch.index_select(v_pages, 0, group.pages, out=gathered[1])
    if group.foreign_slots is not None:
        gathered.view(-1, geometry.head_dim).index_fill_(0, group.foreign_slots, 0.0)
    both = gathered.view(2, group.num_rows, geometry.num_kv_heads, -1, geometry.head_dim)
    keys, values = both.narrow(3, group.first_key, group.num_keys)
    return keys, values


def _prefill(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    row: PrefillRow,
    geometry: CacheGeometry,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Attend one row's queries, tile by tile, into `output`."""
    row_keys = k_pages.index_select(0, row.pages).view(geometry.num_kv_heads, -1, geometry.head_dim)
    row_values = v_pages.index_select(0, row.pages).view(geometry.num_kv_heads, -1, geometry.head_dim)
    for tile in row.tiles:
        # [queries, heads, head_dim] to [group, num_kv_heads, queries, head_dim]: query head h belongs to KV head h // group
        # and the keys are the same for every member of the group, without a copy of them.
        shape = (tile.stop - tile.start, geometry.num_kv_heads, -1, geometry.head_dim)
        grouped = query[tile.start : tile.stop].view(shape).permute(2, 1, 0, 3)
        group_size = grouped.shape[0]
        keys = row_keys[:, tile.first_key : tile.last_key].expand(group_size, -1, -1, -1)
        values = row_values[:, tile.first_key : tile.last_key].expand(group_size, -1, -1, -1)
        # A copy of the mask, since torch's attention on CUDA refuses rows that are not aligned.
        own_sinks = None if sinks is None else sinks.view(geometry.num_kv_heads, -1).T.unsqueeze(2)
        attended = _attend(grouped, keys, values, tile.mask.contiguous(), scale, soft_cap, own_sinks)
        output[tile.start : tile.stop].view(shape).copy_(attended.permute(2, 1, 0, 3))


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention with float32 scores; query [B, H, Q, D], keys and values [B, H, K, D], mask additive, sinks
    broadcastable to [B, H, Q]."""
    if soft_cap is None and sinks is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = query.float() @ keys.float().transpose(-1, -2) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    if mask is not None:
        scores += mask
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        own = sinks.unsqueeze(-1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, own), dim=-1).softmax(dim=-1)[..., :-1]
    return (weights @ values.float()).to(query.dtype)
