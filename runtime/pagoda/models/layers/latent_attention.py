"""Multi-head latent attention over a paged cache of latent vectors.

`kv_b_proj` makes keys and values of all heads from one latent vector a token. Here they are never computed: its half for keys
is multiplied into the queries, its half for values into the output of attention (the absorbed form), in prefill as in decode,
so that a token's bits do not depend on which of the two computed it:

    q_nope [T, H, nope] ─▶ kv_b_proj, for keys ─▶ [T, H, rank] ┐
    q_rope [T, H, rope] ─▶ rotated ────────────────────────────────┴▶ query ─▶ attention over the latents ─▶ [T, H, rank]
                                                                               ─▶ kv_b_proj, for values ─▶ o_proj
    cached of a token:     latent [rank] │ rotated key [rope]

Tensor parallel ranks have a part of the heads each, and all of them the same cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pagoda.models.layer_config import MLAConfig
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.layers.latent_linear import LatentHeads, LatentMethod
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.norm import RMSNorm, build_norm
from pagoda.models.sharding import LayerShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


class LatentAttention(nn.Module):
    """The layer that `MLAConfig` describes; of its heads, those of this rank."""

    def __init__(
        self, config: MLAConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = shard.heads.size
        self.interleaved = config.rope.interleaved
        # Keys and values are of the model's dtype: see models.kv_scales.
        self.kv_scales: tuple[float, float] | None = None
        hidden, rank = Shard.whole(hidden_size), Shard.whole(config.kv_rank)
        query = shard.heads.times(config.nope_dim + config.rope_dim)
        norm = replace(build.norm, eps=config.norm_eps)

        def latent_norm(size: int) -> RMSNorm:
            return build_norm(size, norm, dtype=build.dtype, device=build.device)

        self.q_a_proj: Linear | None = None
        self.q_a_layernorm: RMSNorm | None = None
        if config.query_rank is None:
            self.q_proj = build.linear(prefix, hidden, {"q_proj": query})
        else:
            query_rank = Shard.whole(config.query_rank)
            self.q_a_proj = build.linear(prefix, hidden, {"q_a_proj": query_rank}, bias=config.bias)
            self.q_a_layernorm = latent_norm(config.query_rank)
            self.q_proj = build.linear(prefix, query_rank, {"q_b_proj": query})
        cached = Shard.whole(config.head_dim)
        self.kv_a_proj = build.linear(prefix, hidden, {"kv_a_proj_with_mqa": cached}, bias=config.bias)
        self.kv_a_layernorm = latent_norm(config.kv_rank)
        heads = LatentHeads(self.num_heads, config.nope_dim, config.value_dim)
        made = shard.heads.times(config.nope_dim + config.value_dim)
        self.kv_b_proj = build.latent_linear(prefix, rank, {"kv_b_proj": made}, heads)
        values = shard.heads.times(config.value_dim)
        self.o_proj = build.row_parallel(prefix, values, {"o_proj": hidden}, bias=config.bias)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """Projections and the norms of the latents."""
        targets = {}
        for linear in (self.q_a_proj, self.q_proj, self.kv_a_proj, self.kv_b_proj, self.o_proj):
            if linear is not None:
                targets.update(linear.weight_targets(prefix))
        if self.q_a_layernorm is not None:
            targets.update(self.q_a_layernorm.weight_targets(f"{prefix}q_a_layernorm."))
        targets.update(self.kv_a_layernorm.weight_targets(f"{prefix}kv_a_layernorm."))
        return targets

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `SelfAttention.forward`; `kv_cache` is one tensor [num_blocks, 1, block_size, kv_rank + rope_dim]."""
        config, (cache,) = self.config, kv_cache
        cos, sin, *query_scales = rotary
        method = self.kv_b_proj.method
        assert isinstance(method, LatentMethod)
        stream = x
        if self.q_a_proj is not None and self.q_a_layernorm is not None:
            stream = self.q_a_layernorm(self.q_a_proj(x))[0]
        query = self.q_proj(stream).view(len(x), self.num_heads, -1)
        q_nope, q_rope = query.split((config.nope_dim, config.rope_dim), dim=2)
        latent, k_rope = self.kv_a_proj(x).split((config.kv_rank, config.rope_dim), dim=1)
        latent = self.kv_a_layernorm(latent.contiguous())[0]
        q_rope, k_rope = backend.active.apply_rotary(
            q_rope.contiguous(), k_rope.unsqueeze(1).contiguous(), cos, sin, self.interleaved
        )
        # With one head, a slot is a row. Tokens of padding share the first, which nobody reads.
        kept = torch.cat((latent, k_rope.squeeze(1)), dim=1)
        cache.view(-1, config.head_dim).index_copy_(0, metadata.slot_mapping, kept)
        query = torch.cat((method.to_latent(self.kv_b_proj, q_nope), q_rope), dim=2)
        for scales in query_scales:
            query = query * scales.to(query.dtype)
        attended = backend.active.latent_attention(query, cache, metadata, config.scale, config.kv_rank)
        output: torch.Tensor = self.o_proj(method.to_values(self.kv_b_proj, attended).reshape(len(x), -1))
        return output
