"""Linear layers whose weights come quantized: what they are loaded from, and how.

A layer gives its float weight back before anything is in it, waits with an `AwaitedLinearMethod`, and gets a
`PackedLinearMethod` when it is loaded: a model is never there in floats, and no layer is there twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.layers.embedding import TokenEmbedding
from pagoda.models.layers.linear import Linear, LinearMethod
from pagoda.models.packing import PackedLinearMethod
from pagoda.models.quantization.layouts import StoredForm, TensorSource, check_order, read_rows, stored_forms
from pagoda.models.quantization.packing import PackedWeightBuilder
from pagoda.models.quantization.schemes import HEAD, QuantizationConfig, WeightScheme
from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import TensorGroup
from pagoda_kernels.linear import PANEL, PackedWeight

# Values that are unpacked or rounded at a time; with their float32 forms, some 15 MiB.
_ELEMENTS_AT_ONCE = 1 << 20
_INPUTS_AT_ONCE = {8: 4, 4: 8}  # that the kernels take


class AwaitedLinearMethod(LinearMethod):
    """A quantized weight that is not there yet; each layer that awaits one has an instance of its own."""

    def __init__(self, layer: Linear, prefix: str, schemes: Mapping[str, WeightScheme]) -> None:
        """`schemes`: of each part of the layer. Raises `ConfigError` where the ranks' shares of the inputs cut groups."""
        self.prefix = prefix
        self.schemes = dict(schemes)
        for name, scheme in schemes.items():
            _check_inputs(f"{prefix}{name}", scheme, layer.inputs)

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Not possible: a layer is created with a float weight, which it gives back."""
        raise NotImplementedError("a layer awaits its quantized weight only once it is created")

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """The biases: they are floats, and loaded like other floats."""
        if layer.bias is None:
            return {}
        targets, row = {}, 0
        for name, shard in layer.parts.items():
            targets[f"{prefix}{name}.bias"] = WeightTarget(layer.bias[row : row + shard.length], (shard,))
            row += shard.size
        return targets

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Not possible before the weight is loaded."""
        raise RuntimeError(f"{self.prefix}{'/'.join(layer.parts)} is not loaded")

    def stored_forms(self, layer: Linear) -> dict[str, StoredForm]:
        """The tensors of the checkpoint that hold the weight, those of all ranks' shares."""
        forms: dict[str, StoredForm] = {}
        for name, shard in layer.parts.items():
            forms |= stored_forms(self.schemes[name], f"{self.prefix}{name}", shard.full_size, layer.inputs.full_size)
        return forms

    def load(self, layer: Linear, source: TensorSource) -> PackedWeight:
        """Read this rank's share of the weight and let the layer multiply by it."""
        bits = next(iter(self.schemes.values())).bits
        inputs = layer.inputs
        builder = PackedWeightBuilder(bits, layer.out_features, layer.in_features)
        at_once = max(PANEL, _ELEMENTS_AT_ONCE // inputs.full_size // PANEL * PANEL)
        for part, shard in layer.parts.items():
            name, scheme = f"{self.prefix}{part}", self.schemes[part]
            check_order(scheme, name, inputs.full_size, source)
            end = shard.start + shard.length
            for start in range(shard.start, end, at_once):
                outputs = slice(start, min(start + at_once, end))
                builder.append(read_rows(scheme, name, outputs, inputs.slice, inputs.full_size, source))
        weight = builder.finish()
        layer.method = PackedLinearMethod(weight)
        return weight


class QuantizedEmbedding(TokenEmbedding):
    """The vectors of a vocabulary, looked up in the int8 weight of the head that shares them; of a rank, its own share."""

    def __init__(self, vocabulary: Shard, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # no weight of its own
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.packed: PackedWeight | None = None

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """None: the head loads the weight."""
        return {}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] to [T, hidden_size]."""
        assert self.packed is not None, "the embedding is not loaded"
        return int8_rows(self.packed, token_ids).to(self.dtype)


class VocabParallelQuantizedEmbedding(QuantizedEmbedding):
    """The same where the vocabulary is spread over ranks: one of them has a token's vector, the others add zero."""

    def __init__(self, vocabulary: Shard, dtype: torch.dtype, group: TensorGroup) -> None:
        super().__init__(vocabulary, dtype)
        self.group = group

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T], the same on all ranks, to [T, hidden_size], the same on all ranks."""
        rows = token_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= self.vocabulary.length)
        vectors = super().forward(rows.masked_fill_(elsewhere, 0))
        return self.group.all_reduce(vectors.masked_fill_(elsewhere.unsqueeze(1), 0))


def int8_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of an int8 weight with one scale for each, dequantized: int64 ids [T] to float32 [T, in_features]."""
    assert weight.scales is not None
    stored = weight.values[ids // PANEL, :, ids % PANEL].flatten(1).float()
    return stored.sub_(128).mul_(weight.scales[0, ids].unsqueeze(1))


def quantize_layers(model: DecoderForCausalLM, quantization: QuantizationConfig) -> None:
    """Let the linear layers of a model that is not loaded await quantized weights; those left out stay floats.

    The head, where nothing else is said of it, is rounded to 8 bits; an embedding that shares its weight looks it up there.

    Raises:
        CheckpointError: layers that run as one are not quantized alike.
        ConfigError: the ranks' shares do not fit the groups.
    """
    model.quantization = quantization
    for prefix, layer in _linear_layers(model):
        schemes = {name: quantization.scheme_of(f"{prefix}{name}") for name in layer.parts}
        quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        if not quantized:
            continue
        if len({None if scheme is None else (scheme.bits, scheme.group_size) for scheme in schemes.values()}) > 1:
            said = ", ".join(f"{name}: {scheme or 'not quantized'}" for name, scheme in schemes.items())
            raise CheckpointError(f"{prefix[:-1]}: layers that run as one must be quantized alike, found {said}")
        _await(layer, prefix, quantized)
    if model.lm_head is not None:
        _quantize_head(model, model.lm_head, quantization)


def awaited_layers(model: nn.Module) -> list[tuple[Linear, AwaitedLinearMethod]]:
    """The layers whose quantized weights are not there yet, in the order of the model."""
    linears = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return [(layer, layer.method) for layer in linears if isinstance(layer.method, AwaitedLinearMethod)]


def load_awaited(model: DecoderForCausalLM, source: TensorSource) -> Iterator[tuple[str, int]]:
    """Load every awaited weight, one after the other; yields each layer's name and the values that it has here."""
    for layer, method in awaited_layers(model):
        weight = method.load(layer, source)
        if layer is model.lm_head and isinstance(model.embed_tokens, QuantizedEmbedding):
            model.embed_tokens.packed = weight
        yield f"{method.prefix}{'/'.join(layer.parts)}", layer.out_features * layer.in_features


def _linear_layers(model: DecoderForCausalLM) -> Iterator[tuple[str, Linear]]:
    for index, layer in zip(model.share.layers, model.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        yield attention, layer.self_attn.qkv_proj
        yield attention, layer.self_attn.o_proj
        yield mlp, layer.mlp.gate_up_proj
        yield mlp, layer.mlp.down_proj


def _quantize_head(model: DecoderForCausalLM, head: Linear, quantization: QuantizationConfig) -> None:
    is_tied = model.config.tie_word_embeddings
    (name,) = head.parts
    scheme = None if is_tied else quantization.scheme_of(name)
    _await(head, "", {name: scheme or HEAD})
    if not is_tied or model.embed_tokens is None:
        return
    if model.groups.tensor.size == 1:
        model.embed_tokens = QuantizedEmbedding(model.share.vocabulary, model.dtype)
    else:
        model.embed_tokens = VocabParallelQuantizedEmbedding(model.share.vocabulary, model.dtype, model.groups.tensor)


def _await(layer: Linear, prefix: str, schemes: Mapping[str, WeightScheme]) -> None:
    layer.method = AwaitedLinearMethod(layer, prefix, schemes)
    del layer.weight


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
