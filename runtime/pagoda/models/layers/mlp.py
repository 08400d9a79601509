"""Feed-forward layers."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear, RowParallelLinear
from pagoda.models.sharding import ModelShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import TensorParallelGroup
from pagoda_kernels import backend


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`, gate and up in one product, over the units held here."""

    def __init__(
        self,
        config: ModelConfig,
        shard: ModelShard,
        group: TensorParallelGroup,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        units, hidden = shard.intermediate, Shard.whole(config.hidden_size)
        self.gate_up_proj = Linear(
            hidden, {"gate_proj": units, "up_proj": units}, bias=config.mlp_bias, dtype=dtype, device=device
        )
        self.down_proj = RowParallelLinear(
            units, {"down_proj": hidden}, bias=config.mlp_bias, group=group, dtype=dtype, device=device
        )

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {**self.gate_up_proj.weight_targets(prefix), **self.down_proj.weight_targets(prefix)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        output: torch.Tensor = self.down_proj(backend.active.silu_and_mul(self.gate_up_proj(x)))
        return output
