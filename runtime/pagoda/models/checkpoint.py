"""The safetensors files of a checkpoint directory, read through mmap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names in safetensors headers of the element types that a weight may have.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not yet read; `dtype` as safetensors spells it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: those the index names, or the single one.

    Raises `CheckpointError` where there are none, or one that the index names does not exist.
    """
    index = directory / INDEX_FILE
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{index} names files that do not exist: {', '.join(missing)}")
        return files
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    raise CheckpointError(f"{directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}")


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Name, place, shape and type of every tensor in `files`, from their headers alone.

    Raises `CheckpointError` for a file that is not safetensors or is cut off, and for a name that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                    header = reader.get_slice(name)
                    if name in tensors:
                        raise CheckpointError(f"tensor {name} is in both {tensors[name].file} and {file}")
                    tensors[name] = StoredTensor(name, file, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
    return tensors


def read_tensors(file: Path, parts: Mapping[str, tuple[slice, ...] | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named parts of tensors of one file (None: the whole), one at a time.

    Each is a view of the mapped file, good until the next is taken: of a part, nothing but the part is read.
    """
    with safe_open(file, framework="pt", device="cpu") as reader:
        for name, index in parts.items():
            yield name, reader.get_tensor(name) if index is None else reader.get_slice(name)[index]
