"""`kv_b_proj` of multi-head latent attention, packed for the CPU's kernels as it is read: a weight a head for each half."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda.models.layers.latent_linear import LatentHeads, LatentMethod
from pagoda.models.layers.linear import Linear
from pagoda.models.loading.checkpoint import FLOAT_TYPES, TensorSource, TensorSpec
from pagoda.models.loading.packed import DeferredLinearMethod, LoadedMethod
from pagoda.models.quantization.layers import DeferredQuantizedMethod
from pagoda_kernels import backend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight


class PackedLatentMethod(LoadedMethod, LatentMethod):
    """`keys` and `values`: the halves, as `KernelBackend.packed_linear_heads` takes them."""

    def __init__(self, heads: LatentHeads, keys: PackedWeight, values: PackedWeight) -> None:
        self.heads = heads
        self.keys = keys
        self.values = values

    @override
    def weights(self) -> dict[str, PackedWeight]:
        return {"keys": self.keys, "values": self.values}

    @override
    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Not possible: the halves are multiplied by themselves."""
        raise NotImplementedError("kv_b_proj is kept as two halves: use to_latent and to_values")

    @override
    def to_latent(self, layer: Linear, query: torch.Tensor) -> torch.Tensor:
        return backend.active.packed_linear_heads(query, self.keys, layer.in_features)

    @override
    def to_values(self, layer: Linear, attended: torch.Tensor) -> torch.Tensor:
        return backend.active.packed_linear_heads(attended, self.values, self.heads.value_dim)


class DeferredLatentMethod(DeferredLinearMethod):
    """The halves that are not there yet. They stay floats: of a checkpoint in which they are quantized, dequantized ones."""

    def __init__(
        self, prefix: str, dtype: torch.dtype, heads: LatentHeads, quantized: DeferredQuantizedMethod | None
    ) -> None:
        """`dtype`: the model's, float32 or bfloat16. `quantized`: how the checkpoint has them, None: as floats."""
        super().__init__(prefix)
        self.dtype = dtype
        self.heads = heads
        self.quantized = quantized

    @override
    def tensor_specs(self, layer: Linear) -> dict[str, TensorSpec]:
        if self.quantized is not None:
            return self.quantized.tensor_specs(layer)
        (shard,) = layer.parts.values()
        return {self._name(layer): TensorSpec((shard.full_size, layer.inputs.full_size), FLOAT_TYPES)}

    @override
    def load(self, layer: Linear, source: TensorSource) -> LoadedMethod:
        if self.quantized is not None:
            (scheme,) = self.quantized.schemes.values()
            rows = self.quantized.rows(layer, layer.out_features, source)
            weight = torch.cat([each.dequantized(scheme.bits) for each in rows])
        else:
            (shard,) = layer.parts.values()
            weight = source.read(self._name(layer), shard.slice, layer.inputs.slice)
        keys, values = self.heads.split(weight)
        return PackedLatentMethod(self.heads, self._packed(keys.transpose(1, 2)), self._packed(values))

    @override
    def with_weights(self, weights: Mapping[str, PackedWeight]) -> LoadedMethod:
        return PackedLatentMethod(self.heads, weights["keys"], weights["values"])

    def _name(self, layer: Linear) -> str:
        (part,) = layer.parts
        return f"{self.prefix}{part}.weight"

    def _packed(self, weight: torch.Tensor) -> PackedWeight:
        """[heads, outputs, inputs]; as `DeferredFloatMethod`, in bfloat16 where that changes nothing that float32 has."""
        _, outputs, inputs = weight.shape
        rows = F.pad(weight, (0, 0, 0, -outputs % PANEL)).reshape(-1, inputs)
        is_narrow = self.dtype == torch.bfloat16 or torch.equal(rows.bfloat16().to(rows.dtype), rows)
        packed = empty_packed(len(rows), inputs, torch.bfloat16 if is_narrow else torch.float32)
        pack_into(packed, 0, rows)
        return packed


def latent_method(
    prefix: str, dtype: torch.dtype, heads: LatentHeads, quantized: DeferredQuantizedMethod | None, *, packed: bool
) -> DeferredLatentMethod | None:
    """How a rank's share of `kv_b_proj` is loaded; None: as floats that torch multiplies.

    `quantized`: how a quantized model would have it, which counts where the checkpoint stores it so, and not where floats
    would be rounded. `packed`: whether float weights are.
    """
    if quantized is not None and all(scheme.layout == "float" for scheme in quantized.schemes.values()):
        quantized = None
    return DeferredLatentMethod(prefix, dtype, heads, quantized) if packed or quantized is not None else None
