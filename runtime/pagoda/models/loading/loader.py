"""Filling a model's weights: from a checkpoint, or with random numbers.

Every checkpoint tensor has one destination. Most parameters are allocated already, and copied into; the weights that the
model keeps packed or quantized follow, and are made as they are read. Files are mapped, and read some megabytes at a time:
besides the weights as they are kept, little memory is taken. A rank reads its own part of each tensor and no other, save where
a scale depends on the rest; names and shapes it checks against the whole model.
"""

from __future__ import annotations

import logging
import math
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.checkpoint_files import shown, shown_name
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.layers.embedding import PackedEmbedding
from pagoda.models.loading.checkpoint import (
    FLOAT_TYPES,
    StoredTensors,
    TensorSpec,
    chunks,
    stored_tensors,
    with_model_names,
)
from pagoda.models.loading.packed import deferred_layers, load_packed_weights
from pagoda.models.loading.stored_tensor import StoredTensor
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.weight_files import listed, weight_files
from pagoda.models.weights import WeightTarget

logger = logging.getLogger(__name__)

# Tensors that are no weights: what old checkpoints carry although it follows from the configuration, and the scales of a
# float8 KV cache, which `models.kv_scales` reads where there is one.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")

# Files are read in parallel: a disk, and a network volume even more, is slow for one reader at a time.
MAX_LOADER_THREADS = 4

_NARROW_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


class LoadListener(Protocol):
    """Called after each tensor, in the thread that loaded it (one call at a time)."""

    def __call__(self, name: str, bytes_done: int, bytes_total: int) -> None:
        """`name` is loaded; the bytes are those of the model's own dtype."""


def check_weights(
    config: ModelConfig, quantization: QuantizationConfig | None, directory: str | Path
) -> dict[str, StoredTensor]:
    """The weights in `directory` by the model's names, if they are those of the model that `config` describes.

    Takes no memory for weights, so it can be called before a model of any size is built. Tensors that the model has no place
    for are left out, as transformers does, and logged; save beside a quantized layer, where one may change what others mean.
    Raises `CheckpointError`: weights that are missing, of the wrong shape or of a type that is no float, files that are
    missing or cut off. The message names the tensor, what was expected and what was found.
    """
    stored = stored_tensors(weight_files(Path(directory)))
    model = build_model(config, torch.float32, "meta", quantization=quantization)
    specs = {name: TensorSpec(target.full_shape, FLOAT_TYPES) for name, target in model.weight_targets().items()}
    specs |= _specs_of_deferred(model)
    for second, first in model.tied_weights().items():
        # Under either name, or under both.
        specs[second] = replace(specs[first], optional=True)
        specs[first] = replace(specs[first], optional=second in stored)
    outputs = {linear.name: linear.outputs for linear in config.linears()}
    stored = with_model_names(stored, specs, config.names, outputs)
    unknown = [
        name
        for name in stored
        if name not in specs and not name.endswith(IGNORED_SUFFIXES) and not config.names.is_ignored(name)
    ]
    _check_names(stored, specs, unknown, directory)
    if quantization is not None:
        _check_quantized_layers(unknown, specs, directory)
    if unknown:
        logger.warning("%d tensors in %s are not used: %s", len(unknown), directory, listed(unknown))
    stored = {name: tensor for name, tensor in stored.items() if name in specs}
    _check_specs(stored, specs)
    return stored


def with_tie_as_stored(config: ModelConfig, directory: str | Path) -> ModelConfig:
    """`config`, with a head of its own where config.json ties it to the embedding but the checkpoint holds two that differ.

    transformers takes both as they are stored, too: the configuration of such a checkpoint is wrong.
    """
    if not config.tie_word_embeddings:
        return config
    names = ("lm_head.weight", "model.embed_tokens.weight")
    stored = with_model_names(stored_tensors(weight_files(Path(directory))), names, config.names)
    head, embedding = (stored.get(name) for name in names)
    if head is None or embedding is None or _are_equal(head, embedding):
        return config
    logger.warning(
        "tie_word_embeddings is true in config.json, but lm_head.weight and model.embed_tokens.weight differ: not tied"
    )
    return replace(config, tie_word_embeddings=False)


def load_weights(model: DecoderForCausalLM, directory: str | Path, progress: LoadListener | None = None) -> None:
    """Fill every weight that `model` holds from the safetensors files in `directory`, converting to the model's dtype.

    Raises `CheckpointError` before anything is copied: as `check_weights`.
    """
    stored = check_weights(model.config, model.quantization, directory)
    _narrow_embedding(model, stored)
    targets = model.weight_targets()
    for second, first in model.tied_weights().items():
        _settle_tied_names(stored, targets, second, first)
    deferred_bytes = (
        sum(layer.out_features * layer.in_features for layer, _ in deferred_layers(model)) * model.dtype.itemsize
    )
    copied_bytes = sum(target.destination.nbytes for target in targets.values())
    bytes_total = copied_bytes + deferred_bytes
    _copy(stored, targets, bytes_total, progress)
    bytes_done = copied_bytes
    stored = _with_second_names(stored, model.tied_weights())
    for name, num_values in load_packed_weights(model, lambda: StoredTensors(stored)):
        bytes_done += num_values * model.dtype.itemsize
        if progress is not None:
            progress(name, bytes_done, bytes_total)


def initialize_dummy_weights(model: DecoderForCausalLM, seed: int = 0, std: float = 0.02) -> None:
    """Fill every weight without a checkpoint: norms with 1, everything else with normal noise of `std`.

    The same `seed`, model and dtype give the same weights, for any order of the layers and number of ranks.
    """
    for name, target in model.weight_targets().items():
        destination = target.destination
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            destination.fill_(1.0)
            continue
        # 32 bits are all that torch's generator on the CPU takes of a seed.
        generator = torch.Generator(destination.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        if target.is_whole:
            destination.normal_(0.0, std, generator=generator)
        else:
            full = torch.empty(target.full_shape, dtype=destination.dtype, device=destination.device)
            destination.copy_(full.normal_(0.0, std, generator=generator)[target.index])
    specs = _specs_of_deferred(model)
    for _ in load_packed_weights(model, lambda: DummyTensorSource(specs, model.dtype, seed, std)):
        pass


class DummyTensorSource:
    """Normal noise as a `TensorSource`, the same as `initialize_dummy_weights` gives a float tensor of that name."""

    def __init__(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype, seed: int, std: float) -> None:
        self._specs = specs
        self._dtype, self._seed, self._std = dtype, seed, std
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """A part of the tensor, which is made whole when the first part of it is asked for."""
        if self._last[0] != name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
            full = torch.empty(self._specs[name].shape, dtype=self._dtype)
            self._last = (name, full.normal_(0.0, self._std, generator=generator))
        return self._last[1][index]


def _narrow_embedding(model: DecoderForCausalLM, stored: Mapping[str, StoredTensor]) -> None:
    """Keep an embedding that shares no weight as it is stored, where the model's dtype is wider than that."""
    embedding = model.embed_tokens
    tensor = stored.get("model.embed_tokens.weight")
    if embedding is None or tensor is None or model.dtype != torch.float32 or tensor.dtype not in _NARROW_TYPES:
        return
    if isinstance(embedding, PackedEmbedding) or getattr(model.lm_head, "weight", None) is embedding.weight:
        return
    embedding.keep_in(_NARROW_TYPES[tensor.dtype])


def _with_second_names(stored: Mapping[str, StoredTensor], tied: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors under the model's names; `tied`: first name by second name."""
    second_names = {first: second for second, first in tied.items() if first not in stored and second in stored}
    return {**stored, **{first: stored[second] for first, second in second_names.items()}}


def _specs_of_deferred(model: DecoderForCausalLM) -> dict[str, TensorSpec]:
    """What the tensors look like that deferred weights are read from."""
    return {name: spec for layer, method in deferred_layers(model) for name, spec in method.tensor_specs(layer).items()}


def _settle_tied_names(
    stored: dict[str, StoredTensor],
    targets: dict[str, WeightTarget],
    second: str,
    first: str,
) -> None:
    """A tied weight may be stored under either name, or under both (`with_tie_as_stored`): keep one of them."""
    if second not in stored:
        return
    if first in stored:
        del stored[second]
    elif first in targets:
        targets[second] = targets.pop(first)


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape or not first.shape:
        return False
    sources = [StoredTensors({tensor.name: tensor}) for tensor in (first, second)]
    return all(
        bool((sources[0].read(first.name, part) == sources[1].read(second.name, part)).all())
        for part in chunks(slice(0, first.shape[0]), _row_bytes(first))
    )


def _row_bytes(tensor: StoredTensor) -> int:
    """At most; of a row of a tensor's first dimension."""
    return 8 * math.prod(tensor.shape[1:])


def _check_names(
    stored: Mapping[str, StoredTensor], specs: Mapping[str, TensorSpec], unknown: list[str], directory: str | Path
) -> None:
    missing = [name for name, spec in specs.items() if name not in stored and not spec.optional]
    if not missing:
        return
    problem = f"{len(missing)} tensors of the model are missing: {listed(missing)}"
    if unknown:
        problem += f"; {len(unknown)} tensors are unknown to the model: {listed(unknown)}"
    raise CheckpointError(f"{directory} does not fit its config.json: {problem}")


def _check_quantized_layers(unknown: list[str], specs: Mapping[str, TensorSpec], directory: str | Path) -> None:
    layers = {name.rpartition(".")[0] for name, spec in specs.items() if not set(spec.types) <= set(FLOAT_TYPES)}
    beside = [name for name in unknown if name.rpartition(".")[0] in layers]
    if beside:
        raise CheckpointError(
            f"{directory} does not fit its config.json: {len(beside)} tensors of quantized layers are unknown to the model: "
            f"{listed(beside)}"
        )


def _check_specs(stored: Mapping[str, StoredTensor], specs: Mapping[str, TensorSpec]) -> None:
    for name, tensor in stored.items():
        expected = specs[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} has shape "
                f"{shown(list(tensor.shape))}, config.json makes it {list(expected.shape)}"
            )
        if tensor.dtype not in expected.types:
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} is of type {tensor.dtype}; "
                f"supported: {', '.join(expected.types)}"
            )


def _copy(
    stored: Mapping[str, StoredTensor],
    targets: Mapping[str, WeightTarget],
    bytes_total: int,
    progress: LoadListener | None,
) -> None:
    names_by_file: dict[Path, list[str]] = {}
    for name, target in targets.items():
        if target.destination.numel():  # else all rows here are padding
            names_by_file.setdefault(stored[name].file, []).append(name)
    bytes_done = 0
    lock = threading.Lock()

    def copy_file(names: list[str]) -> None:
        nonlocal bytes_done
        source = StoredTensors(stored)
        for name in names:
            destination = targets[name].destination
            rows, *others = targets[name].index
            for part in chunks(rows, _row_bytes(stored[name])):
                here = slice(part.start - rows.start, part.stop - rows.start)
                destination[here].copy_(source.read(name, part, *others))
            if targets[name].offset:
                destination.add_(targets[name].offset)
            with lock:
                bytes_done += destination.nbytes
                if progress is not None:
                    progress(name, bytes_done, bytes_total)

    if not names_by_file:
        return
    with ThreadPoolExecutor(min(MAX_LOADER_THREADS, len(names_by_file)), "load-weights") as pool:
        for future in [pool.submit(copy_file, names) for names in names_by_file.values()]:
            future.result()
