"""The safetensors files of a checkpoint directory, read through mmap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import (
    MAX_NAMES_IN_ERROR,
    checkpoint_file,
    has_file,
    read_json_object,
    shown_name,
    shown_reason,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names in safetensors headers of the element types that a weight may have.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

MAX_INDEX_BYTES = 64 << 20
# A header has about a hundred bytes for each tensor of the file.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 19
_HEADER_LENGTH_BYTES = 8

# Pages of a mapped file that were read count as this process's memory while it is mapped: after so much, it is mapped again.
_MAPPED_BYTES = 16 << 20
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not yet read; `dtype` as safetensors spells it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor of a checkpoint must look like; `types` as safetensors spells them. An optional one may be absent."""

    shape: tuple[int, ...]
    types: tuple[str, ...]
    optional: bool = False


class TensorSource(Protocol):
    """Where tensors come from."""

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name."""

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """A part of a tensor, in the type that is stored; without `index`, all of it. Neither to write to, nor to keep."""


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: those the index names, or the single one.

    Raises `CheckpointError` where there are none, and for one that is missing, no regular file or outside of `directory`.
    """
    if has_file(directory, INDEX_FILE):
        weight_map = read_json_object(directory, INDEX_FILE, max_bytes=MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"{directory / INDEX_FILE}: weight_map must be an object of tensor names and file names"
            )
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not has_file(directory, name)]
        if missing:
            raise CheckpointError(f"{directory / INDEX_FILE} names files that do not exist: {listed(missing)}")
        return [checkpoint_file(directory, name) for name in names]
    if has_file(directory, SINGLE_FILE):
        return [checkpoint_file(directory, SINGLE_FILE)]
    raise CheckpointError(f"{directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}")


def listed(names: Iterable[str]) -> str:
    """The first few of `names` for an error message, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMES_IN_ERROR} more" if len(ordered) > MAX_NAMES_IN_ERROR else ""
    return ", ".join(map(shown_name, ordered[:MAX_NAMES_IN_ERROR])) + more


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Name, place, shape and type of every tensor in `files`, from their headers alone.

    Raises `CheckpointError` for a file that is not safetensors or is cut off, and for a name that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            _check_header_length(file)
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                    header = reader.get_slice(name)
                    if name in tensors:
                        raise CheckpointError(f"tensor {shown_name(name)} is in both {tensors[name].file} and {file}")
                    if len(tensors) == MAX_TENSORS:
                        raise CheckpointError(
                            f"{file.parent} holds more than {MAX_TENSORS} tensors, as many as are allowed"
                        )
                    tensors[name] = StoredTensor(name, file, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {shown_reason(error)}") from error
    return tensors


def _check_header_length(file: Path) -> None:
    """The library itself reads headers of up to 100 MB, and takes several times that while it does."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: it names a header of {length} bytes; "
            f"at most {MAX_HEADER_BYTES} are allowed"
        )


class StoredTensors:
    """The tensors of a checkpoint as a `TensorSource`; for one thread."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._file: Path | None = None
        self._reader: Any = None
        self._bytes_read = 0

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """A view of the mapped file: nothing but the part is read. The map stays as long as the view is held."""
        tensor = self._tensors[name]
        if tensor.file != self._file or self._bytes_read >= _MAPPED_BYTES:
            self._reader = None  # one map at a time
            self._reader = safe_open(tensor.file, framework="pt", device="cpu")
            self._file, self._bytes_read = tensor.file, 0
        part: torch.Tensor = (
            self._reader.get_slice(tensor.name)[index] if index else self._reader.get_tensor(tensor.name)
        )
        self._bytes_read += part.nbytes
        return part


def chunks(rows: slice, row_bytes: int) -> Iterator[slice]:
    """`rows` in runs of a few megabytes, of at least one row each."""
    at_once = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(rows.start, rows.stop, at_once):
        yield slice(start, min(start + at_once, rows.stop))
