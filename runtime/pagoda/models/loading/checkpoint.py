"""The weight files of a checkpoint directory, read through mmap: safetensors, or what torch.save writes."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown_name, shown_reason
from pagoda.models.loading.torch_file import load_torch_file, type_name

# Names in safetensors headers of the element types that a weight may have.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

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


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Name, place, shape and type of every tensor in `files`, from their headers alone.

    Raises `CheckpointError` for a file that is not what its name says or is cut off, and for a name that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _torch_headers(file) if file.suffix == ".bin" else _safetensors_headers(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {shown_name(tensor.name)} is in both {tensors[tensor.name].file} and {file}"
                )
            if len(tensors) == MAX_TENSORS:
                raise CheckpointError(f"{file.parent} holds more than {MAX_TENSORS} tensors, as many as are allowed")
            tensors[tensor.name] = tensor
    return tensors


def with_model_names(stored: Mapping[str, StoredTensor], names: Container[str]) -> dict[str, StoredTensor]:
    """`stored` under the names that the model has for them, among `names`; a tensor with no such name keeps its own.

    A checkpoint of the model without its head has no `model.` in front of its names, one that was wrapped has it twice:
    transformers adds and removes one.
    """
    renamed = {}
    for name, tensor in stored.items():
        candidates = (name, f"model.{name}", name.removeprefix("model."))
        found = next((candidate for candidate in candidates if candidate in names), name)
        if found == name or found not in stored:
            renamed[found] = tensor
    return renamed


def _safetensors_headers(file: Path) -> Iterator[StoredTensor]:
    try:
        _check_header_length(file)
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                header = reader.get_slice(name)
                yield StoredTensor(name, file, tuple(header.get_shape()), header.get_dtype())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {shown_reason(error)}") from error


def _torch_headers(file: Path) -> Iterator[StoredTensor]:
    for name, tensor in load_torch_file(file).items():
        yield StoredTensor(name, file, tuple(tensor.shape), type_name(tensor))


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
            self._reader = _TorchReader(tensor.file) if tensor.file.suffix == ".bin" else _open_safetensors(tensor.file)
            self._file, self._bytes_read = tensor.file, 0
        part: torch.Tensor = (
            self._reader.get_slice(tensor.name)[index] if index else self._reader.get_tensor(tensor.name)
        )
        self._bytes_read += part.nbytes
        return part


def _open_safetensors(file: Path) -> Any:
    return safe_open(file, framework="pt", device="cpu")


class _TorchReader:
    """A file of torch.save with the two calls that are made of a safetensors reader."""

    def __init__(self, file: Path) -> None:
        self._tensors = load_torch_file(file)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    get_slice = get_tensor


def chunks(rows: slice, row_bytes: int) -> Iterator[slice]:
    """`rows` in runs of a few megabytes, of at least one row each."""
    at_once = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(rows.start, rows.stop, at_once):
        yield slice(start, min(start + at_once, rows.stop))
