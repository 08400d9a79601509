"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pagoda.models.layer_config import Activation, DenseMLP
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend

_OPERATIONS: dict[Activation, str] = {
    "silu": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "clamped_swiglu": "clamped_swiglu_and_mul",
}


def activation_of(name: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """[T, 2 * size] to [T, size] by the active backend."""
    operation = _OPERATIONS[name]

    def activate(x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = getattr(backend.active, operation)(x)
        return activated

    return activate


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020) and its kin: `down(activation(gate(x)) * up(x))`, gate and up in one product, over the units held
    here."""

    def __init__(self, config: DenseMLP, units: Shard, hidden_size: int, build: LayerBuilder, prefix: str) -> None:
        super().__init__()
        self.config = config
        hidden = Shard.whole(hidden_size)
        self.activate = activation_of(config.activation)
        self.gate_up_proj = build.linear(prefix, hidden, {"gate_proj": units, "up_proj": units}, bias=config.bias)
        self.down_proj = build.row_parallel(prefix, units, {"down_proj": hidden}, bias=config.bias)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {**self.gate_up_proj.weight_targets(prefix), **self.down_proj.weight_targets(prefix)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        output: torch.Tensor = self.down_proj(self.activate(self.gate_up_proj(x)))
        return output
