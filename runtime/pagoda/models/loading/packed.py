"""Weights packed for the CPU's kernels, as they are read.

A layer gives its weight back before anything is in it, waits with a `DeferredLinearMethod`, and gets a `PackedLinearMethod`
when it is loaded, some rows at a time: a model is never there unpacked, and no layer is there twice.
"""

from __future__ import annotations

import ctypes
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import nn

from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.layers.embedding import TokenEmbedding
from pagoda.models.layers.linear import Linear, LinearMethod, UnquantizedLinearMethod
from pagoda.models.loading.checkpoint import FLOAT_TYPES, TensorSource, TensorSpec
from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import TensorParallelGroup
from pagoda_kernels import backend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight

# Values that are read and packed at a time.
_ELEMENTS_AT_ONCE = 1 << 19


class PackedLinearMethod(LinearMethod):
    """A loaded weight, packed: each layer that is packed has an instance of its own."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Not possible: layers are created unpacked, and packed when they are loaded."""
        raise NotImplementedError("a packed layer is made when its weight is loaded")

    def weight_targets(self, layer: Linear, prefix: str) -> dict[str, WeightTarget]:
        """None: nothing can be loaded into a packed weight."""
        return {}

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """One matrix product for all parts."""
        return backend.active.packed_linear(x.contiguous(), self.weight, layer.bias, layer.out_dtype)


class DeferredLinearMethod(LinearMethod):
    """A packed weight that is not there yet; each layer without one has an instance of its own."""

    def __init__(self, prefix: str) -> None:
        """`prefix`: that of the layer's parts in the checkpoint."""
        self.prefix = prefix

    def create_weights(
        self, layer: Linear, bias: bool, weight: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Not possible: a layer is created with a float weight, which it gives back."""
        raise NotImplementedError("a layer awaits its packed weight only once it is created")

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

    @abstractmethod
    def tensor_specs(self, layer: Linear) -> dict[str, TensorSpec]:
        """The tensors of the checkpoint that hold the weight, those of all ranks' shares."""

    @abstractmethod
    def read(self, layer: Linear, source: TensorSource) -> PackedWeight:
        """This rank's share of the weight."""


class DeferredFloatMethod(DeferredLinearMethod):
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


class PackedEmbedding(TokenEmbedding):
    """The vectors of a vocabulary, looked up in the packed weight of the head that shares them; of a rank, its own share."""

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
        if self.packed.bits == 8:
            return int8_rows(self.packed, token_ids).to(self.dtype)
        return backend.active.packed_rows(self.packed, token_ids, self.dtype)


class VocabParallelPackedEmbedding(PackedEmbedding):
    """The same where the vocabulary is spread over ranks: one of them has a token's vector, the others add zero."""

    def __init__(self, vocabulary: Shard, dtype: torch.dtype, group: TensorParallelGroup) -> None:
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


def pack_when_loaded(model: DecoderForCausalLM) -> None:
    """Let every linear layer of a model that is not loaded, and that awaits no quantized weight, await its own packed.

    Not for a model in float16: there are no kernels for it.
    """
    for prefix, layer in linear_layers(model):
        if isinstance(layer.method, UnquantizedLinearMethod):
            defer_weight(model, layer, DeferredFloatMethod(prefix, model.dtype))


def defer_weight(model: DecoderForCausalLM, layer: Linear, method: DeferredLinearMethod) -> None:
    """Let a layer give its float weight back; an embedding that shares it looks the packed one up."""
    is_shared = model.embed_tokens is not None and model.embed_tokens.weight is layer.weight
    layer.method = method
    del layer.weight
    if not is_shared:
        return
    if model.groups.tp_group.size == 1:
        model.embed_tokens = PackedEmbedding(model.shard.vocabulary, model.dtype)
    else:
        model.embed_tokens = VocabParallelPackedEmbedding(model.shard.vocabulary, model.dtype, model.groups.tp_group)


def linear_layers(model: DecoderForCausalLM) -> Iterator[tuple[str, Linear]]:
    """Every linear layer, with the prefix of its parts' names in the checkpoint; the head is the last."""
    for index, layer in zip(model.shard.layers, model.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        yield attention, layer.self_attn.qkv_proj
        yield attention, layer.self_attn.o_proj
        yield mlp, layer.mlp.gate_up_proj
        yield mlp, layer.mlp.down_proj
    if model.lm_head is not None:
        yield "", model.lm_head


def deferred_layers(model: nn.Module) -> list[tuple[Linear, DeferredLinearMethod]]:
    """The layers whose packed weights are not there yet, in the order of the model."""
    linears = [layer for layer in model.modules() if isinstance(layer, Linear)]
    return [(layer, layer.method) for layer in linears if isinstance(layer.method, DeferredLinearMethod)]


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

    def read(layer: Linear, method: DeferredLinearMethod) -> PackedWeight:
        weight: PackedWeight = method.read(layer, own.source)
        return weight

    largest_first = sorted(deferred_layers(model), key=lambda each: -each[0].out_features * each[0].in_features)
    pool = ThreadPoolExecutor(num_threads, "load-weights", initializer=begin)
    try:
        futures = {pool.submit(read, layer, method): (layer, method) for layer, method in largest_first}
        for future in as_completed(futures):
            layer, method = futures[future]
            weight = future.result()
            layer.method = PackedLinearMethod(weight)
            if layer is model.lm_head and isinstance(model.embed_tokens, PackedEmbedding):
                model.embed_tokens.packed = weight
            yield f"{method.prefix}{'/'.join(layer.parts)}", layer.out_features * layer.in_features
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what a thread sets for itself counts for those that begin later, too
        _give_free_memory_back()


def _give_free_memory_back() -> None:
    """Return to the system what malloc keeps for threads that have ended, dozens of megabytes each, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def weight_bytes(model: DecoderForCausalLM) -> int:
    """Memory that the weights of a loaded model take, each counted once."""
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    packed = [
        layer.method.weight.nbytes for _, layer in linear_layers(model) if isinstance(layer.method, PackedLinearMethod)
    ]
    return sum(parameters.values()) + sum(packed)
