"""Linear layers behind one interface, fused where a checkpoint keeps several side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


class LinearMethod(ABC):
    """How a linear layer keeps its weight and multiplies by it: as it is in the checkpoint, packed, quantized, sharded."""

    @abstractmethod
    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the layer's parameters, without filling them; share `weight` where one is given."""

    @abstractmethod
    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, torch.Tensor]:
        """Names of the checkpoint tensors the layer is loaded from, each with the view it is copied into."""

    @abstractmethod
    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias` for x [T, in_features]; returns [T, out_features]."""


class UnquantizedLinearMethod(LinearMethod):
    """The checkpoint's weight in the model's dtype, multiplied by torch."""

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """One [out_features, in_features] weight; the parts of a fused layer are rows of it."""
        if weight is None:
            values = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
            weight = nn.Parameter(values, requires_grad=False)
        layer.weight = weight
        layer.bias = None
        if bias:
            layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype, device=device), requires_grad=False)

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, torch.Tensor]:
        """`<part>.weight`, and `<part>.bias` where the layer has one."""
        targets = {}
        row = 0
        for name, rows in layer.parts.items():
            targets[f"{prefix}{name}.weight"] = layer.weight[row : row + rows]
            if layer.bias is not None:
                targets[f"{prefix}{name}.bias"] = layer.bias[row : row + rows]
            row += rows
        return targets

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """One matrix product for all parts."""
        return F.linear(x, layer.weight, layer.bias)


UNQUANTIZED = UnquantizedLinearMethod()


class Linear(nn.Module):
    """A linear layer, or several that share their input, fused into one.

        parts = {"q_proj": 64, "k_proj": 16, "v_proj": 16}     weight  ┌ q_proj.weight  64 rows ┐
                                                                       │ k_proj.weight  16 rows │ [96, in_features]
                                                                       └ v_proj.weight  16 rows ┘

    `parts` maps the names the checkpoint gives them to their output sizes, in output order.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight: nn.Parameter | None = None,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(self.parts.values())
        self.method = method
        method.create_weights(self, bias, weight, dtype, device)

    def weight_targets(self, prefix: str) -> dict[str, torch.Tensor]:
        """See `LinearMethod.weight_targets`; `prefix` is that of the module the layer stands in."""
        return self.method.weight_targets(self, prefix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in_features] to [T, out_features]."""
        return self.method.apply(self, x)
