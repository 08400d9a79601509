"""Self-attention over a paged KV cache."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.layer_config import AttentionConfig, DeltaNetConfig, MLAConfig
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.layers.delta_net import GatedDeltaNet
from pagoda.models.layers.latent_attention import LatentAttention
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.sharding import LayerShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) as an `AttentionConfig` describes it.

    A rank has a run of query heads and the KV heads that these read.
    """

    def __init__(
        self,
        config: AttentionConfig,
        shard: LayerShard,
        hidden_size: int,
        build: LayerBuilder,
        prefix: str,
        *,
        input_size: int | None = None,
    ) -> None:
        """`input_size`: where it is not the hidden size."""
        super().__init__()
        self.config = config
        self.num_heads = shard.heads.size
        self.num_kv_heads = shard.kv_heads.size
        self.head_dim = config.head_dim
        self.scale = config.scale
        self.sliding_window = config.window
        self.soft_cap = config.soft_cap
        self.interleaved = config.rope is not None and config.rope.interleaved
        hidden, inputs = Shard.whole(hidden_size), Shard.whole(input_size or hidden_size)
        query, kv = shard.heads.times(config.head_dim), shard.kv_heads.times(config.head_dim)
        with_gate = query.times(1 + config.output_gate)
        parts = {"q_proj": with_gate}
        if config.kv_source is None:
            parts |= {"k_proj": kv} if config.keys_are_values else {"k_proj": kv, "v_proj": kv}
        self.qkv_proj = build.linear(prefix, inputs, parts, bias=config.qkv_bias)
        self.o_proj = build.row_parallel(prefix, query, {"o_proj": hidden}, bias=config.output_bias)
        # Set by models.kv_scales where the KV cache is of float8: how many times its keys, and its values, count.
        self.kv_scales: tuple[float, float] | None = None
        self.norm_eps = build.norm.eps
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm == "head":
            self.q_norm = build.rms_norm(config.head_dim)
            self.k_norm = build.rms_norm(config.head_dim) if config.kv_source is None else None
        self.sinks: nn.Parameter | None = None
        if config.sinks:
            self._heads = shard.heads
            values = torch.empty(shard.heads.size, dtype=torch.float32, device=build.device)
            self.sinks = nn.Parameter(values, requires_grad=False)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """Projections, and norms of queries and keys and sinks where there are any."""
        targets = {**self.qkv_proj.weight_targets(prefix), **self.o_proj.weight_targets(prefix)}
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                targets.update(norm.weight_targets(f"{prefix}{name}."))
        if self.sinks is not None:
            targets[f"{prefix}sinks"] = WeightTarget(self.sinks, (self._heads,))
        return targets

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write this step's keys and values to the cache, then attend.

        x [T, input_size] to [T, hidden_size]; `rotary` is what `RotaryEmbedding` gives for the tokens' positions; `kv_cache`
        is this layer's `(k, v)`, each [num_blocks, num_kv_heads, block_size, head_dim].
        """
        attended = self._attend(*self._project(x), rotary, kv_cache, metadata)
        output: torch.Tensor = self.o_proj(attended.flatten(1))
        return output

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What every head reads, [T, heads, head_dim]."""
        k_cache, v_cache = kv_cache
        cos, sin, *query_scales = rotary
        query = backend.active.rotate_and_store(
            query,
            key,
            value,
            cos,
            sin,
            self.q_norm.weight if self.q_norm is not None else None,
            self.k_norm.weight if self.k_norm is not None else None,
            self.norm_eps,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            self.kv_scales,
            self.interleaved,
        )
        for scales in query_scales:
            query = query * scales.to(query.dtype)
        return backend.active.paged_attention(
            query,
            k_cache,
            v_cache,
            metadata,
            self.scale,
            self.sliding_window,
            self.soft_cap,
            self.kv_scales,
            self.sinks,
        )

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [T, heads, head_dim]."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value


class WidthNormedAttention(SelfAttention):
    """Queries, and keys, of all heads are normalized together (OLMo 2)."""

    def __init__(
        self, config: AttentionConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__(config, shard, hidden_size, build, prefix)
        self.query_norm = build.width_norm(shard.heads.times(config.head_dim))
        self.key_norm = build.width_norm(shard.kv_heads.times(config.head_dim))

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """With the norms."""
        return {
            **super().weight_targets(prefix),
            **self.query_norm.weight_targets(f"{prefix}q_norm."),
            **self.key_norm.weight_targets(f"{prefix}k_norm."),
        }

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = super()._project(x)
        query = self.query_norm(query.flatten(1))[0].view(query.shape)
        key = self.key_norm(key.flatten(1))[0].view(key.shape)
        return query, key, value


class GatedAttention(SelfAttention):
    """What a head reads is multiplied by the sigmoid of its gate (Qwen3-Next)."""

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `SelfAttention`."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        both, key, value = heads.split((2 * self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        query, gate = both.view(x.shape[0], self.num_heads, 2, self.head_dim).unbind(2)
        attended = self._attend(query.contiguous(), key, value, rotary, kv_cache, metadata)
        output: torch.Tensor = self.o_proj((attended * gate.sigmoid()).flatten(1))
        return output


class NormedValueAttention(SelfAttention):
    """Each head of values is normalized, without a weight; where keys are values, they are what keys are made of (Gemma 4)."""

    def __init__(
        self, config: AttentionConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__(config, shard, hidden_size, build, prefix)
        self.value_weight = nn.Buffer(
            torch.ones(config.head_dim, dtype=torch.float32, device=build.device), persistent=False
        )

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = heads.tensor_split((self.num_heads, self.num_heads + self.num_kv_heads), dim=1)
        if self.config.keys_are_values:
            value = key
        return query, key, backend.active.rms_norm(value.contiguous(), self.value_weight, self.norm_eps)[0]


class SharedKVAttention(SelfAttention):
    """Queries alone: keys and values are those that an earlier layer keeps (Gemma 3n, Gemma 4)."""

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `SelfAttention`; `kv_cache` is the other layer's, which has written this step's tokens."""
        query = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)[0]
        (cos, sin, *_), (k_cache, v_cache) = rotary, kv_cache
        query, _ = backend.active.apply_rotary(query, query[:, :1].contiguous(), cos, sin, self.interleaved)
        attended = backend.active.paged_attention(
            query,
            k_cache,
            v_cache,
            metadata,
            self.scale,
            self.sliding_window,
            self.soft_cap,
            self.kv_scales,
            self.sinks,
        )
        output: torch.Tensor = self.o_proj(attended.flatten(1))
        return output


def build_attention(
    config: AttentionConfig | MLAConfig | DeltaNetConfig,
    shard: LayerShard,
    hidden_size: int,
    build: LayerBuilder,
    prefix: str,
) -> SelfAttention | LatentAttention | GatedDeltaNet:
    """The layer that `config` describes; `prefix`: the name of the module."""
    if isinstance(config, MLAConfig):
        return LatentAttention(config, shard, hidden_size, build, prefix)
    if isinstance(config, DeltaNetConfig):
        return GatedDeltaNet(config, shard, hidden_size, build, prefix)
    if config.output_gate:
        return GatedAttention(config, shard, hidden_size, build, prefix)
    if config.kv_source is not None:
        return SharedKVAttention(config, shard, hidden_size, build, prefix)
    if config.value_norm or config.keys_are_values:
        return NormedValueAttention(config, shard, hidden_size, build, prefix)
    kind = WidthNormedAttention if config.qk_norm == "width" else SelfAttention
    return kind(config, shard, hidden_size, build, prefix)
