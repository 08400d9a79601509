"""Self-attention over a paged KV cache."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear, RowParallelLinear
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.sharding import ModelShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import TensorParallelGroup
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions, and query and key norm where the family has it.

    A rank has a run of query heads and the KV heads that these read.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: ModelShard,
        group: TensorParallelGroup,
        sliding_window: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_heads = shard.heads.size
        self.num_kv_heads = shard.kv_heads.size
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = sliding_window
        hidden = Shard.whole(config.hidden_size)
        query, kv = shard.heads.times(config.head_dim), shard.kv_heads.times(config.head_dim)
        self.qkv_proj = Linear(
            hidden,
            {"q_proj": query, "k_proj": kv, "v_proj": kv},
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.o_proj = RowParallelLinear(
            query, {"o_proj": hidden}, bias=config.output_bias, group=group, dtype=dtype, device=device
        )
        # Set by models.kv_scales where the KV cache is of float8: how many times its keys, and its values, count.
        self.kv_scales: tuple[float, float] | None = None
        self.norm_eps = config.rms_norm_eps
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """Projections, and the norms of queries and keys where there are any."""
        targets = {**self.qkv_proj.weight_targets(prefix), **self.o_proj.weight_targets(prefix)}
        if self.q_norm is not None and self.k_norm is not None:
            targets.update(self.q_norm.weight_targets(f"{prefix}q_norm."))
            targets.update(self.k_norm.weight_targets(f"{prefix}k_norm."))
        return targets

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write this step's keys and values to the cache, then attend.

        x [T, hidden_size] to the same shape; `rotary` is what `RotaryEmbedding` gives for the tokens' positions; `kv_cache`
        is this layer's `(k, v)`, each [num_blocks, num_kv_heads, block_size, head_dim].
        """
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        k_cache, v_cache = kv_cache
        query = backend.active.rotate_and_store(
            query,
            key,
            value,
            *rotary,
            self.q_norm.weight if self.q_norm is not None else None,
            self.k_norm.weight if self.k_norm is not None else None,
            self.norm_eps,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            self.kv_scales,
        )
        attended = backend.active.paged_attention(
            query, k_cache, v_cache, metadata, self.scale, self.sliding_window, kv_scales=self.kv_scales
        )
        output: torch.Tensor = self.o_proj(attended.flatten(1))
        return output
