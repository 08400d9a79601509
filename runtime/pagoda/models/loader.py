"""Filling a model's weights: from a checkpoint, or with random numbers.

The model's parameters are allocated already, and every checkpoint tensor has one destination in them. Files are mapped, not
read into memory, and copied tensor by tensor: besides the weights themselves, no memory is taken that the system could not
reclaim.
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

# Tensors that old checkpoints carry although they follow from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

# Files are read side by side: a disk, and a network volume even more, is slow for one reader at a time.
MAX_LOADER_THREADS = 4

MAX_NAMES_IN_ERROR = 8


class Progress(Protocol):
    """Told after each tensor, from the thread that loaded it (one call at a time)."""

    def __call__(self, name: str, bytes_done: int, bytes_total: int) -> None:
        """`name` is loaded; the bytes are those of the model's own dtype."""


def load_weights(model: DecoderForCausalLM, directory: str | Path, progress: Progress | None = None) -> None:
    """Fill every weight of `model` from the safetensors files in `directory`, converting to the model's dtype.

    Raises `CheckpointError` before anything is copied: weights that are missing, unknown, of the wrong shape or of a type
    that is no float, files that are missing or cut off. The message names the tensor, what was expected and what was found.
    """
    stored = {
        name: tensor
        for name, tensor in stored_tensors(weight_files(Path(directory))).items()
        if not name.endswith(IGNORED_SUFFIXES)
    }
    targets = model.weight_targets()
    _settle_tied_names(stored, targets, model.tied_weights())
    _check_names(stored, targets, directory)
    _check_shapes(stored, targets)
    _copy(stored, targets, progress)


def initialize_dummy_weights(model: DecoderForCausalLM, seed: int = 0, std: float = 0.02) -> None:
    """Fill every weight without a checkpoint: norms with 1, everything else with normal noise of `std`.

    The same `seed`, model and dtype give the same weights, whatever the order of the layers.
    """
    for name, destination in model.weight_targets().items():
        if name.endswith("norm.weight"):
            destination.fill_(1.0)
            continue
        # 32 bits are all that torch's generator on the CPU takes of a seed.
        generator = torch.Generator(destination.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        destination.normal_(0.0, std, generator=generator)


def _settle_tied_names(
    stored: dict[str, StoredTensor], targets: dict[str, torch.Tensor], tied_weights: Mapping[str, str]
) -> None:
    """A tied weight may be stored under either name, or under both if the values are the same: keep one of them."""
    for second, first in tied_weights.items():
        if second not in stored:
            continue
        if first not in stored:
            targets[second] = targets.pop(first)
            continue
        if not torch.equal(_read(stored[first]), _read(stored[second])):
            raise CheckpointError(
                f"the checkpoint ties {second} to {first} (tie_word_embeddings) but holds different values for them; "
                "if they are meant to differ, set tie_word_embeddings to false in config.json"
            )
        del stored[second]


def _read(tensor: StoredTensor) -> torch.Tensor:
    return next(iter(read_tensors(tensor.file, [tensor.name])))[1]


def _check_names(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor], directory: str | Path
) -> None:
    missing = [name for name in targets if name not in stored]
    unknown = [name for name in stored if name not in targets]
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


def _check_shapes(stored: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in stored.items():
        expected = tuple(targets[name].shape)
        if tensor.shape != expected:
            raise CheckpointError(
                f"tensor {name} in {tensor.file} has shape {list(tensor.shape)}, config.json makes it {list(expected)}"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"tensor {name} in {tensor.file} is of type {tensor.dtype}; supported: {', '.join(FLOAT_TYPES)}"
            )


def _copy(stored: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
    names_by_file: dict[Path, list[str]] = {}
    for tensor in stored.values():
        names_by_file.setdefault(tensor.file, []).append(tensor.name)
    bytes_total = sum(target.nbytes for target in targets.values())
    bytes_done = 0
    lock = threading.Lock()

    def copy_file(file: Path, names: list[str]) -> None:
        nonlocal bytes_done
        for name, source in read_tensors(file, names):
            targets[name].copy_(source)
            with lock:
                bytes_done += targets[name].nbytes
                if progress is not None:
                    progress(name, bytes_done, bytes_total)

    with ThreadPoolExecutor(min(MAX_LOADER_THREADS, len(names_by_file)), "load-weights") as pool:
        for future in [pool.submit(copy_file, file, names) for file, names in names_by_file.items()]:
            future.result()
