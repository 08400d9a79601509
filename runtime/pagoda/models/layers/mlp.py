"""Feed-forward layers."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear
from pagoda_kernels.activation import silu_and_mul


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(
            config.hidden_size,
            {"gate_proj": size, "up_proj": size},
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(
            size, {"down_proj": config.hidden_size}, bias=config.mlp_bias, dtype=dtype, device=device
        )

    def weight_targets(self, prefix: str) -> dict[str, torch.Tensor]:
        """Gate, up and down projections."""
        return {**self.gate_up_proj.weight_targets(prefix), **self.down_proj.weight_targets(prefix)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        output: torch.Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(x)))
        return output
