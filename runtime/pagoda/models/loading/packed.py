"""Weights packed for the CPU's kernels, as they are read.

A layer is built with a `DeferredLinearMethod`, which has no weight yet, and gets a `PackedLinearMethod` when it is loaded,
some rows at a time: a model is never there unpacked, and no layer is there twice.
"""

from __future__ import annotations

import ctypes
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import nn
from typing_extensions import override

from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.layers.embedding import PackedEmbedding
from pagoda.models.layers.linear import Linear, LinearMethod, bias_targets, create_bias
from pagoda.models.loading.checkpoint import FLOAT_TYPES, TensorSource, TensorSpec
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight

# Values that are read and packed at a time.
_ELEMENTS_AT_ONCE = 1 << 19


class LoadedMethod(LinearMethod):
    """A weight that is packed and loaded: each layer that is packed has an instance of its own."""

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Not possible: layers are created with the method that loads their weight."""
        raise NotImplementedError("a packed layer is made when its weight is loaded")

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """None: nothing can be loaded into a packed weight."""
        return {}

    @abstractmethod
    def weights(self) -> dict[str, PackedWeight]:
        """The packed weights that it is made of; see `DeferredLinearMethod.with_weights`."""

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        return sum(weight.nbytes for weight in self.weights().values())


class PackedLinearMethod(LoadedMethod):
    """One packed weight, of all parts of the layer."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    @override
    def weights(self) -> dict[str, PackedWeight]:
        return {"weight": self.weight}

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """One matrix product for all parts."""
        return backend.active.packed_linear(x.contiguous(), self.weight, layer.bias, layer.out_dtype)


class DeferredLinearMethod(LinearMethod):
    """A packed weight that is not there yet; each layer without one has an instance of its own."""

    comes_loaded = True

    def __init__(self, prefix: str) -> None:
        """`prefix`: that of the layer's parts in the checkpoint."""
        self.prefix = prefix

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """The bias alone: the weight comes with its values. Not for a weight that another layer has."""
        assert weight is None
        create_bias(layer, bias, dtype, device)

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """The biases: they are floats, and loaded like other floats."""
        return bias_targets(layer, prefix)

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """Not possible before the weight is loaded."""
        raise RuntimeError(f"{self.prefix}{'/'.join(layer.parts)} is not loaded")

    @abstractmethod
    def tensor_specs(self, layer: Linear) -> dict[str, TensorSpec]:
        """The tensors of the checkpoint that hold the weight, those of all ranks' shares."""

    @abstractmethod
    def load(self, layer: Linear, source: TensorSource) -> LoadedMethod:
        """The method with this rank's share of the weight."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, PackedWeight]) -> LoadedMethod:
        """The method that `load` gave, from its `weights`. Raises `KeyError` where one is missing."""


class DeferredWeightMethod(DeferredLinearMethod):
    """One packed weight, of all parts of the layer."""

    @abstractmethod
    def read(self, layer: Linear, source: TensorSource) -> PackedWeight:
        """This rank's share of the weight."""

    @override
    def load(self, layer: Linear, source: TensorSource) -> LoadedMethod:
        return PackedLinearMethod(self.read(layer, source))

    @override
    def with_weights(self, weights: Mapping[str, PackedWeight]) -> LoadedMethod:
        return PackedLinearMethod(weights["weight"])


class DeferredFloatMethod(DeferredWeightMethod):
    """A float weight, packed without a change of its values, but where the model's dtype asks for one.

    In a float32 model, weights that bfloat16 holds exactly, as those of most checkpoints, are packed so: products with
    float32 inputs are the same to the last bit, from half of the memory.
    """

    def __init__(self, prefix: str, dtype: torch.dtype) -> None:
        """`dtype`: the model's, float32 or bfloat16."""
        super().__init__(prefix)
        self.dtype = dtype

    def tensor_specs(self, layer: Linear) -> dict[str, TensorSpec]:
        """One tensor a part."""
        return {
            f"{self.prefix}{part}.weight": TensorSpec((shard.full_size, layer.inputs.full_size), FLOAT_TYPES)
            for part, shard in layer.parts.items()
        }

    def read(self, layer: Linear, source: TensorSource) -> PackedWeight:
        """In bfloat16; if a value is not exact in bfloat16, the whole weight is read again in float32."""
        weight = self._read_as(torch.bfloat16, layer, source)
        if weight is None:
            weight = self._read_as(torch.float32, layer, source)
        assert weight is not None
        return weight

    def _read_as(self, dtype: torch.dtype, layer: Linear, source: TensorSource) -> PackedWeight | None:
        may_round = dtype == self.dtype
        at_once = max(PANEL, _ELEMENTS_AT_ONCE // layer.in_features // PANEL * PANEL)
        weight = empty_packed(layer.out_features, layer.in_features, dtype)
        num_filled = 0
        for start in range(0, layer.out_features, at_once):
            rows = []
            for stored in self._stored_rows(layer, slice(start, start + at_once), source):
                rows.append(stored.to(dtype))
                is_same = may_round or stored.dtype == dtype or torch.equal(rows[-1].to(stored.dtype), stored)
                if not is_same:
                    return None
            if rows:
                pack_into(weight, start, rows[0] if len(rows) == 1 else torch.cat(rows))
                num_filled = start + sum(map(len, rows))
        weight.values[-(-num_filled // PANEL) :].zero_()  # where all rows are padding
        return weight

    def _stored_rows(self, layer: Linear, rows: slice, source: TensorSource) -> Iterator[torch.Tensor]:
        """What the checkpoint has of some rows of the layer, part after part."""
        first_row = 0
        for part, shard in layer.parts.items():
            start = max(rows.start, first_row) - first_row
            stop = min(rows.stop - first_row, shard.length)
            if start < stop:
                outputs = slice(shard.start + start, shard.start + stop)
                yield source.read(f"{self.prefix}{part}.weight", outputs, layer.inputs.slice)
            first_row += shard.size


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer, with the prefix of its parts' names."""
    for module in model.modules():
        if isinstance(module, Linear):
            yield module.prefix, module


def deferred_layers(model: nn.Module) -> list[tuple[Linear, DeferredLinearMethod]]:
    """The layers whose packed weights are not there yet, in the order of the model."""
    return [
        (layer, layer.method) for _, layer in linear_layers(model) if isinstance(layer.method, DeferredLinearMethod)
    ]


def layer_name(layer: Linear) -> str:
    """The names of its parts in the model."""
    return f"{layer.prefix}{'/'.join(layer.parts)}"


def set_loaded(model: DecoderForCausalLM, layer: Linear, loaded: LoadedMethod) -> None:
    """Give a layer of `model` its weight, and the embedding the one that it shares with the head."""
    layer.method = loaded
    if layer is model.lm_head and isinstance(model.embed_tokens, PackedEmbedding):
        assert isinstance(loaded, PackedLinearMethod)
        model.embed_tokens.packed = loaded.weight


def load_packed_weights(
    model: DecoderForCausalLM, make_source: Callable[[], TensorSource]
) -> Iterator[tuple[str, int]]:
    """Load every deferred weight; yields each layer's name and the values that it has here, in the order they are done.

    As many layers at a time as torch has threads, each by one thread with a source of its own: pieces are small, and threads
    that share one wait for each other longer than they work.
    """
    num_threads = torch.get_num_threads()
    own = threading.local()

    def begin() -> None:
        torch.set_num_threads(1)
        own.source = make_source()

    def load(layer: Linear, method: DeferredLinearMethod) -> LoadedMethod:
        return method.load(layer, own.source)

    largest_first = sorted(deferred_layers(model), key=lambda each: -each[0].out_features * each[0].in_features)
    pool = ThreadPoolExecutor(num_threads, "load-weights", initializer=begin)
    try:
        futures = {pool.submit(load, layer, method): layer for layer, method in largest_first}
        for future in as_completed(futures):
            layer = futures[future]
            set_loaded(model, layer, future.result())
            yield layer_name(layer), layer.out_features * layer.in_features
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what a thread sets for itself counts for those that begin later, too
        _give_free_memory_back()


def _give_free_memory_back() -> None:
    """Return to the system what malloc keeps for threads that have ended, dozens of megabytes each, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def weight_bytes(model: nn.Module) -> int:
    """Memory that the weights of a loaded model take, each counted once."""
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    packed = [layer.method.nbytes for _, layer in linear_layers(model) if isinstance(layer.method, LoadedMethod)]
    return sum(parameters.values()) + sum(packed)


def pack_linear(layer: Linear) -> None:
    """Put the floats of a loaded layer in the form of the CPU's kernels."""
    packed = empty_packed(layer.out_features, layer.in_features, layer.weight.dtype)
    pack_into(packed, 0, layer.weight.data)
    del layer.weight
    layer.method = PackedLinearMethod(packed)
