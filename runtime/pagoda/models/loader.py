"""Filling a model's weights: from a checkpoint, or with random numbers.

The model's parameters are allocated already, and every checkpoint tensor has one destination in them. Files are mapped, not
read into memory, and copied tensor by tensor: besides the weights themselves, no memory is taken that the system could not
reclaim. Quantized weights follow, some rows at a time. A rank reads its own part of each tensor and no other, save where a
scale depends on the rest; names and shapes it checks against the whole model.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint import FLOAT_TYPES, StoredTensor, read_tensors, stored_tensors, weight_files
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.quantization.layers import awaited_layers, load_awaited
from pagoda.models.quantization.layouts import StoredForm
from pagoda.models.registry import build_model
from pagoda.models.weights import WeightTarget

# Tensors that are no weights: what old checkpoints carry although it follows from the configuration, and the scales of a
# float8 KV cache, which `models.kv_scales` reads where there is one.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")

# Files are read side by side: a disk, and a network volume even more, is slow for one reader at a time.
MAX_LOADER_THREADS = 4

MAX_NAMES_IN_ERROR = 8


class Progress(Protocol):
    """Told after each tensor, from the thread that loaded it (one call at a time)."""

    def __call__(self, name: str, bytes_done: int, bytes_total: int) -> None:
        """`name` is loaded; the bytes are those of the model's own dtype."""


def load_weights(model: DecoderForCausalLM, directory: str | Path, progress: Progress | None = None) -> None:
    """Fill every weight that `model` holds from the safetensors files in `directory`, converting to the model's dtype.

    Raises `CheckpointError` before anything is copied: weights that are missing, unknown, of the wrong shape or of a type
    that is no float, files that are missing or cut off. The message names the tensor, what was expected and what was found.
    """
    stored = {
        name: tensor
        for name, tensor in stored_tensors(weight_files(Path(directory))).items()
        if not name.endswith(IGNORED_SUFFIXES)
    }
    targets = model.weight_targets()
    forms = _forms_of_whole_model(model)
    for second, first in model.tied_weights().items():
        _settle_tied_names(stored, targets, forms, second, first)
    _check_names(stored, forms, directory)
    _check_forms(stored, forms)
    bytes_of_quantized = (
        sum(layer.out_features * layer.in_features for layer, _ in awaited_layers(model)) * model.dtype.itemsize
    )
    bytes_of_copied = sum(target.destination.nbytes for target in targets.values())
    bytes_total = bytes_of_copied + bytes_of_quantized
    _copy(stored, targets, bytes_total, progress)
    bytes_done = bytes_of_copied
    for name, num_values in load_awaited(model, _Files(stored, model.tied_weights())):
        bytes_done += num_values * model.dtype.itemsize
        if progress is not None:
            progress(name, bytes_done, bytes_total)


def initialize_dummy_weights(model: DecoderForCausalLM, seed: int = 0, std: float = 0.02) -> None:
    """Fill every weight without a checkpoint: norms with 1, everything else with normal noise of `std`.

    The same `seed`, model and dtype give the same weights, whatever the order of the layers and the number of ranks.
    """
    for name, target in model.weight_targets().items():
        destination = target.destination
        if name.endswith("norm.weight"):
            destination.fill_(1.0)
            continue
        # 32 bits are all that torch's generator on the CPU takes of a seed.
        generator = torch.Generator(destination.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        if target.is_whole:
            destination.normal_(0.0, std, generator=generator)
        else:
            full = torch.empty(target.full_shape, dtype=destination.dtype, device=destination.device)
            destination.copy_(full.normal_(0.0, std, generator=generator)[target.index])
    for _ in load_awaited(model, _MadeUp(model, seed, std)):
        pass


class _Files:
    """The tensors of a checkpoint as a `TensorSource`; `tied`: second names, and what they stand for."""

    def __init__(self, stored: Mapping[str, StoredTensor], tied: Mapping[str, str]) -> None:
        second_names = {first: second for second, first in tied.items() if first not in stored and second in stored}
        self._stored = {**stored, **{first: stored[second] for first, second in second_names.items()}}

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """From the mapped file, which is open only so long: pages that were read count as this process's memory."""
        tensor = self._stored[name]
        return next(iter(read_tensors(tensor.file, {tensor.name: index})))[1]


class _MadeUp:
    """Normal noise as a `TensorSource`, the same as `initialize_dummy_weights` gives a float tensor of that name."""

    def __init__(self, model: DecoderForCausalLM, seed: int, std: float) -> None:
        self._forms = {
            name: form for layer, method in awaited_layers(model) for name, form in method.stored_forms(layer).items()
        }
        self._dtype, self._seed, self._std = model.dtype, seed, std
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def __contains__(self, name: object) -> bool:
        return name in self._forms

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """A part of the tensor, which is made whole when the first part of it is asked for."""
        if self._last[0] != name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
            full = torch.empty(self._forms[name].shape, dtype=self._dtype)
            self._last = (name, full.normal_(0.0, self._std, generator=generator))
        return self._last[1][index]


def _forms_of_whole_model(model: DecoderForCausalLM) -> dict[str, StoredForm]:
    """What every tensor that a checkpoint of the model has looks like, by name, whatever part of it `model` is."""
    if model.groups.layout.world_size > 1:
        model = build_model(model.config, model.dtype, "meta", quantization=model.quantization)
    forms = {name: StoredForm(target.full_shape, FLOAT_TYPES) for name, target in model.weight_targets().items()}
    for layer, method in awaited_layers(model):
        forms |= method.stored_forms(layer)
    return forms


def _settle_tied_names(
    stored: dict[str, StoredTensor],
    targets: dict[str, WeightTarget],
    forms: dict[str, StoredForm],
    second: str,
    first: str,
) -> None:
    """A tied weight may be stored under either name, or under both if the values are the same: keep one of them."""
    if second not in stored:
        return
    if first not in stored:
        forms[second] = forms.pop(first)
        if first in targets:
            targets[second] = targets.pop(first)
        return
    # Each rank compares its own part, all ranks together the whole; one that rounds them compares all.
    part = _part(targets[first]) if first in targets else None
    if not torch.equal(_read(stored[first], part), _read(stored[second], part)):
        raise CheckpointError(
            f"the checkpoint ties {second} to {first} (tie_word_embeddings) but holds different values for them; "
            "if they are meant to differ, set tie_word_embeddings to false in config.json"
        )
    del stored[second]


def _read(tensor: StoredTensor, part: tuple[slice, ...] | None) -> torch.Tensor:
    return next(iter(read_tensors(tensor.file, {tensor.name: part})))[1]


def _part(target: WeightTarget) -> tuple[slice, ...] | None:
    return None if target.is_whole else target.index


def _check_names(stored: Mapping[str, StoredTensor], forms: Mapping[str, StoredForm], directory: str | Path) -> None:
    missing = [name for name, form in forms.items() if name not in stored and not form.optional]
    unknown = [name for name in stored if name not in forms]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the model are missing: {_listed(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} tensors are unknown to the model: {_listed(unknown)}")
    if problems:
        raise CheckpointError(f"{directory} does not fit its config.json: {'; '.join(problems)}")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMES_IN_ERROR} more" if len(ordered) > MAX_NAMES_IN_ERROR else ""
    return ", ".join(ordered[:MAX_NAMES_IN_ERROR]) + more


def _check_forms(stored: Mapping[str, StoredTensor], forms: Mapping[str, StoredForm]) -> None:
    for name, tensor in stored.items():
        expected = forms[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"tensor {name} in {tensor.file} has shape {list(tensor.shape)}, config.json makes it {list(expected.shape)}"
            )
        if tensor.dtype not in expected.types:
            raise CheckpointError(
                f"tensor {name} in {tensor.file} is of type {tensor.dtype}; supported: {', '.join(expected.types)}"
            )


def _copy(
    stored: Mapping[str, StoredTensor],
    targets: Mapping[str, WeightTarget],
    bytes_total: int,
    progress: Progress | None,
) -> None:
    parts_by_file: dict[Path, dict[str, tuple[slice, ...] | None]] = {}
    for name, target in targets.items():
        if target.destination.numel():  # else all rows here are padding
            parts_by_file.setdefault(stored[name].file, {})[name] = _part(target)
    bytes_done = 0
    lock = threading.Lock()

    def copy_file(file: Path, parts: Mapping[str, tuple[slice, ...] | None]) -> None:
        nonlocal bytes_done
        for name, source in read_tensors(file, parts):
            destination = targets[name].destination
            destination.copy_(source)
            with lock:
                bytes_done += destination.nbytes
                if progress is not None:
                    progress(name, bytes_done, bytes_total)

    with ThreadPoolExecutor(min(MAX_LOADER_THREADS, len(parts_by_file)), "load-weights") as pool:
        for future in [pool.submit(copy_file, file, parts) for file, parts in parts_by_file.items()]:
            future.result()
