"""Linear layers whose packed weights are quantized: what they are read from, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.config import ModelConfig
from pagoda.models.layers.linear import Linear
from pagoda.models.loading.checkpoint import TensorSource, TensorSpec
from pagoda.models.loading.packed import DeferredWeightMethod
from pagoda.models.quantization.layouts import check_order, read_rows, tensor_specs
from pagoda.models.quantization.packing import PackedWeightBuilder
from pagoda.models.quantization.rounding import QuantizedRows
from pagoda.models.quantization.schemes import HEAD, QuantizationConfig, WeightScheme, common_scheme
from pagoda.models.sharding import Shard
from pagoda_kernels.types import PANEL, PackedWeight

# Values that are unpacked or rounded at a time; with their float32 forms, some 4 MiB.
_ELEMENTS_AT_ONCE = 1 << 18
_INPUTS_AT_ONCE = {8: 4, 4: 8}  # that the kernels take


class DeferredQuantizedMethod(DeferredWeightMethod):
    """A quantized weight that is not there yet."""

    def __init__(self, prefix: str, inputs: Shard, schemes: Mapping[str, WeightScheme]) -> None:
        """`schemes`: of each part of the layer. Raises `ConfigError` where the ranks' shares of `inputs` cut groups."""
        super().__init__(prefix)
        self.schemes = dict(schemes)
        for name, scheme in schemes.items():
            _check_inputs(f"{prefix}{name}", scheme, inputs)

    def tensor_specs(self, layer: Linear) -> dict[str, TensorSpec]:
        """The tensors of the checkpoint that hold the weight, those of all ranks' shares."""
        specs: dict[str, TensorSpec] = {}
        for name, shard in layer.parts.items():
            specs |= tensor_specs(self.schemes[name], f"{self.prefix}{name}", shard.full_size, layer.inputs.full_size)
        return specs

    def read(self, layer: Linear, source: TensorSource) -> PackedWeight:
        """This rank's share of the weight, in any layout."""
        bits = next(iter(self.schemes.values())).bits
        builder = PackedWeightBuilder(bits, layer.out_features, layer.in_features)
        at_once = max(PANEL, _ELEMENTS_AT_ONCE // layer.inputs.full_size // PANEL * PANEL)
        for rows in self.rows(layer, at_once, source):
            builder.append(rows)
        return builder.finish()

    def rows(self, layer: Linear, at_once: int, source: TensorSource) -> Iterator[QuantizedRows]:
        """This rank's share of the weight, part after part, in pieces of at most `at_once` rows."""
        inputs = layer.inputs
        for part, shard in layer.parts.items():
            name, scheme = f"{self.prefix}{part}", self.schemes[part]
            check_order(scheme, name, inputs.full_size, source)
            end = shard.start + shard.length
            for start in range(shard.start, end, at_once):
                outputs = slice(start, min(start + at_once, end))
                yield read_rows(scheme, name, outputs, inputs.slice, inputs.full_size, source)


def quantized_method(
    prefix: str,
    inputs: Shard,
    parts: Mapping[str, Shard],
    quantization: QuantizationConfig,
    config: ModelConfig,
    *,
    is_head: bool,
) -> DeferredQuantizedMethod | None:
    """How a layer of `config`'s model awaits its quantized weight; None: it stays floats.

    Parts of a layer from a GGUF file are brought to a common scheme, without loss. The head, if no scheme matches it, is
    rounded to 8 bits, but for a GGUF file's; an embedding that shares its weight looks it up there.

    Raises:
        CheckpointError: layers that run as one are not quantized alike.
        ConfigError: the ranks' shares do not fit the groups.
    """
    schemes = {name: _scheme_of(f"{prefix}{name}", quantization, config, is_head) for name in parts}
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if not quantized:
        return None
    if quantization.method == "gguf":
        if len(quantized) < len(schemes):
            return None  # one of the parts is of floats: all are
        common = common_scheme(quantized.values())
        block = (common.group_size or 0) * common.block_groups
        if block and (inputs.start % block or inputs.length % block):
            common = replace(common, block_groups=0)
        quantized = dict.fromkeys(quantized, common)
        schemes = dict(quantized)
    if len({None if scheme is None else (scheme.bits, scheme.group_size) for scheme in schemes.values()}) > 1:
        said = ", ".join(f"{name}: {scheme or 'not quantized'}" for name, scheme in schemes.items())
        raise CheckpointError(f"{prefix[:-1]}: layers that run as one must be quantized alike, found {said}")
    return DeferredQuantizedMethod(prefix, inputs, quantized)


def _scheme_of(name: str, quantization: QuantizationConfig, config: ModelConfig, is_head: bool) -> WeightScheme | None:
    if not is_head or quantization.method == "gguf":
        return quantization.scheme_of(config.names.stored_layer(name))
    return (None if config.tie_word_embeddings else quantization.scheme_of(name)) or HEAD


def _check_inputs(name: str, scheme: WeightScheme, inputs: Shard) -> None:
    unit = _INPUTS_AT_ONCE[scheme.bits]
    group_size = scheme.group_size or unit
    if inputs.full_size % group_size:
        raise CheckpointError(f"{name}: {inputs.full_size} inputs are not a multiple of {group_size} ({scheme})")
    if inputs.start % group_size or inputs.length % group_size:
        possible = [n for n in range(1, inputs.full_size // group_size + 1) if inputs.full_size % (n * group_size) == 0]
        raise ConfigError(
            f"tensor_parallel_size={inputs.full_size // inputs.length} cuts groups of the {inputs.full_size} inputs of {name} "
            f"({scheme}). Possible for this layer: {', '.join(map(str, possible))}"
        )
