"""Linear layers behind one interface, fused where a checkpoint keeps several side by side, and shared by ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.tensor_group import TensorParallelGroup
from pagoda_kernels.interface import LoraLinear

# Values of a weight that are upcast at a time: 4 MiB of float32, which the caches of most processors hold.
_UPCAST_ELEMENTS = 1 << 20


class LinearMethod(ABC):
    """How a linear layer keeps its weight and multiplies by it: as it is in the checkpoint, packed, quantized.

    A method sees the sizes that are allocated on this rank, and where they lie in the stored tensors; never other ranks.
    `comes_loaded`: the weight is not allocated when the layer is built, but made as it is read.
    """

    comes_loaded: ClassVar[bool] = False

    @abstractmethod
    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the layer's parameters, without filling them; share `weight` where one is given."""

    @abstractmethod
    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """Names of the checkpoint tensors the layer is loaded from, each with the part it takes and where that goes."""

    @abstractmethod
    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias` for x [T, in_features]; returns [T, out_features] of `layer.out_dtype`."""


def create_bias(layer: Linear, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    """The bias, which every method keeps as floats, or None."""
    layer.bias = None
    if bias:
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype, device=device), requires_grad=False)


def bias_targets(layer: Linear, prefix: str) -> dict[str, WeightTarget]:
    """`<part>.bias` where the layer has one."""
    targets: dict[str, WeightTarget] = {}
    if layer.bias is None:
        return targets
    row = 0
    for name, shard in layer.parts.items():
        targets[f"{prefix}{name}.bias"] = WeightTarget(layer.bias[row : row + shard.length], (shard,))
        row += shard.size
    return targets


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
        create_bias(layer, bias, dtype, device)

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """`<part>.weight`, and `<part>.bias` where the layer has one."""
        targets = bias_targets(layer, prefix)
        row = 0
        for name, shard in layer.parts.items():
            weight = layer.weight[row : row + shard.length]
            targets[f"{prefix}{name}.weight"] = WeightTarget(weight, (shard, layer.inputs))
            row += shard.size
        return targets

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """One matrix product for all parts."""
        return F.linear(x, layer.weight, layer.bias)


class Float32OutputMethod(UnquantizedLinearMethod):
    """A weight in half precision whose products leave as the float32 sums that they are."""

    @abstractmethod
    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T` in float32, for x and weight of one dtype."""

    @override
    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        product = self.multiply(x, layer.weight)
        return product if layer.bias is None else product.add_(layer.bias)


class CublasFloat32OutputMethod(Float32OutputMethod):
    """By cuBLAS, which writes float32 where it is asked to."""

    @override
    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


class UpcastFloat32OutputMethod(Float32OutputMethod):
    """By upcasting some rows of the weight at a time, where torch has no such product."""

    @override
    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        product = torch.empty((len(x), len(weight)), dtype=torch.float32, device=x.device)
        at_once = max(1, _UPCAST_ELEMENTS // weight.shape[1])
        pieces = zip(torch.split(weight, at_once), torch.split(product, at_once, dim=1), strict=True)
        for rows, outputs in pieces:
            torch.mm(wide, rows.float().t(), out=outputs)
        return product


def unquantized_method(dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device) -> UnquantizedLinearMethod:
    """The method for a weight in `dtype` with outputs in `out_dtype`, which is the same or float32."""
    if out_dtype == dtype:
        return UnquantizedLinearMethod()
    if out_dtype != torch.float32:
        raise ValueError(f"out_dtype={out_dtype}: outputs of {dtype} layers are {dtype} or torch.float32")
    return CublasFloat32OutputMethod() if device.type == "cuda" else UpcastFloat32OutputMethod()


class Linear(nn.Module):
    """A linear layer, or several that share their input, fused into one; of each, the outputs that this rank holds.

        parts = {"q_proj": 64, "k_proj": 16, "v_proj": 16}     weight  ┌ q_proj.weight  64 rows ┐
                                                                       │ k_proj.weight  16 rows │ [96, in_features]
                                                                       └ v_proj.weight  16 rows ┘

    Outputs are of `out_dtype`: `dtype` itself, or float32, which leaves sums unrounded.

    `inputs` is the share of the input held here; `parts` maps the names the model gives the layers, within the module of name
    `prefix`, to the share of their outputs, in output order. Padding of a part is rows that are never filled: their outputs
    must not be used. `method`: how the weight is kept; None: as floats that torch multiplies. `lora`: what adapters
    add, set by `LoraModel`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: Shard,
        parts: Mapping[str, Shard],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight: nn.Parameter | None = None,
        out_dtype: torch.dtype | None = None,
        prefix: str = "",
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.inputs = inputs
        self.parts = dict(parts)
        self.in_features = inputs.size
        self.out_features = sum(shard.size for shard in self.parts.values())
        self.out_dtype = out_dtype or dtype
        self.method: LinearMethod = method or unquantized_method(dtype, self.out_dtype, device)
        self.lora: LoraLinear | None = None
        self.method.create_weights(self, bias, weight, dtype, device)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """The parameters by checkpoint name. `prefix`: the name of the module that contains the layer."""
        return self.method.weight_targets(self, prefix)

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in_features] to [T, out_features] of `out_dtype`. `rows`: of the step that x has, see `LoraLinear.add`."""
        return self.multiply(x, rows)

    def multiply(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The product on this rank, with what adapters add to it."""
        product = self.method.apply(self, x)
        if self.lora is not None:
            self.lora.add(x.contiguous(), product, rows)
        return product


class RowParallelLinear(Linear):
    """A linear layer whose input is spread over the ranks of a group: each multiplies its share, and the products are summed.

    The bias, which must be added once, is held by the group's first rank.
    """

    def __init__(
        self,
        inputs: Shard,
        parts: Mapping[str, Shard],
        *,
        bias: bool,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        prefix: str = "",
        method: LinearMethod | None = None,
    ) -> None:
        has_bias = bias and group.rank == 0
        super().__init__(inputs, parts, bias=has_bias, dtype=dtype, device=device, prefix=prefix, method=method)
        self.group = group

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in_features], different on each rank, to [T, out_features], the same on all."""
        return self.group.all_reduce(self.multiply(x, rows))
