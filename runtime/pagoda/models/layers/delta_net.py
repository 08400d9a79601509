"""The gated delta net over paged states."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from pagoda.models.layer_config import DeltaNetConfig
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.sharding import LayerShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights


class GatedDeltaNet(nn.Module):
    """The layer that `DeltaNetConfig` describes. A rank has a run of key heads and the value heads that read them."""

    def __init__(
        self, config: DeltaNetConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        self.value_heads, self.key_heads = shard.heads, shard.kv_heads
        self.norm_eps = build.norm.eps
        hidden = Shard.whole(hidden_size)
        keys, values = self.key_heads.times(config.head_dim), self.value_heads.times(config.value_dim)
        if config.interleaved:
            group = config.num_heads // config.num_kv_heads
            width = 2 * (config.head_dim + group * config.value_dim)
            parts = {"in_proj_qkvz": self.key_heads.times(width)}
            gates = {"in_proj_ba": self.key_heads.times(2 * group)}
        else:
            parts = {"in_proj_q": keys, "in_proj_k": keys, "in_proj_v": values, "in_proj_z": values}
            gates = {"in_proj_b": self.value_heads, "in_proj_a": self.value_heads}
        self.in_proj = build.linear(prefix, hidden, parts)
        self.gate_proj = build.linear(prefix, hidden, gates, is_router=True)
        self.out_proj = build.row_parallel(prefix, values, {"out_proj": hidden})

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=build.device), requires_grad=False)

        self.decay_log, self.step_bias = parameter(self.value_heads.size), parameter(self.value_heads.size)
        self.norm = parameter(config.value_dim)
        # Of all ranks' heads, as it is stored: what is a rank's own lies in three places.
        self.conv = parameter(2 * config.key_size + config.value_size, 1, config.conv_size)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """Projections, gates, convolution and norm."""
        return {
            **self.in_proj.weight_targets(prefix),
            **self.gate_proj.weight_targets(prefix),
            **self.out_proj.weight_targets(prefix),
            f"{prefix}A_log": WeightTarget(self.decay_log, (self.value_heads,)),
            f"{prefix}dt_bias": WeightTarget(self.step_bias, (self.value_heads,)),
            f"{prefix}norm.weight": WeightTarget.whole(self.norm),
            f"{prefix}conv1d.weight": WeightTarget.whole(self.conv),
        }

    @cached_property
    def weights(self) -> DeltaNetWeights:
        """What the operation takes; to be asked for when the weights are loaded."""
        config = self.config
        keys, values = self.key_heads.times(config.head_dim), self.value_heads.times(config.value_dim)
        sizes = [config.key_size, config.key_size, config.value_size]
        by_kind = torch.split(self.conv.data.squeeze(1), sizes)
        own = [part[shard.slice] for part, shard in zip(by_kind, (keys, keys, values), strict=True)]
        return DeltaNetWeights(
            conv=torch.cat(own).t().contiguous(),
            decay_log=self.decay_log.data,
            step_bias=self.step_bias.data,
            norm=self.norm.data,
            eps=self.norm_eps,
            num_key_heads=self.key_heads.size,
            key_dim=config.head_dim,
            interleaved=config.interleaved,
        )

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Move the states of all rows on by this step's tokens, and read them.

        x [T, hidden_size] to the same shape; `kv_cache`: the layer's states, see `KernelBackend.gated_delta_net`.
        """
        del rotary
        read = backend.active.gated_delta_net(self.in_proj(x), self.gate_proj(x), self.weights, kv_cache, metadata)
        output: torch.Tensor = self.out_proj(read)
        return output
