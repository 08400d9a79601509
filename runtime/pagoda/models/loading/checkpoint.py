"""The weight files of a checkpoint, read in parts: safetensors, what torch.save writes (both through mmap), or GGUF."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown_name, shown_reason
from pagoda.models.checkpoint_names import CheckpointNames, TensorPart
from pagoda.models.gguf.architectures import NamedTensor
from pagoda.models.gguf.blocks import Blocks
from pagoda.models.gguf.reader import read_gguf
from pagoda.models.gguf.tensors import GgufReader, float_type, readable_tensors
from pagoda.models.loading.float8 import Float8StoredTensor, scaled, with_float8_scaled
from pagoda.models.loading.stored_tensor import StoredTensor
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufStoredTensor(StoredTensor):
    """A tensor of a GGUF file; `dtype` is that of what is read of it, F32 where it is quantized."""

    named: NamedTensor

    @override
    def take(self, part: TensorPart) -> StoredTensor:
        """Rows of it: all that llama.cpp leaves fused."""
        if part != TensorPart(start=part.start, length=part.length) or part.length is None:
            raise CheckpointError(f"{self.file}: {shown_name(self.name)} cannot be divided as this model needs it")
        return replace(self, named=self.named.rows(part.start, part.length), shape=part.shape(self.shape))


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
    if files and files[0].suffix not in (".safetensors", ".bin"):
        return _gguf_headers(files[0])
    for file in files:
        for tensor in _torch_headers(file) if file.suffix == ".bin" else _safetensors_headers(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {shown_name(tensor.name)} is in both {tensors[tensor.name].file} and {file}"
                )
            if len(tensors) == MAX_TENSORS:
                raise CheckpointError(f"{file.parent} holds more than {MAX_TENSORS} tensors, as many as are allowed")
            tensors[tensor.name] = tensor
    return with_float8_scaled(tensors)


def with_model_names(
    stored: Mapping[str, StoredTensor],
    names: Container[str],
    layout: CheckpointNames | None = None,
    outputs: Mapping[str, int] | None = None,
) -> dict[str, StoredTensor]:
    """`stored` under the names that the model has for them, among `names`; a tensor with no such name keeps its own.

    A checkpoint of the model without its head has no `model.` in front of its names, one that was wrapped has it twice:
    transformers adds and removes one. `layout`: how the family's checkpoints name and fuse tensors; `outputs`: of each of the
    model's linear layers, by which fused ones are split.
    """
    renamed: dict[str, StoredTensor] = {}
    layout = layout or CheckpointNames()
    for own_name, tensor in stored.items():
        name = layout.model_name(own_name)
        parts = _stacked_parts(name, tensor, layout) or _fused_parts(name, tensor, layout, outputs or {})
        for part_name, part in parts.items() if parts else ((name, tensor),):
            found = next((candidate for candidate in _candidates(part_name) if candidate in names), part_name)
            if found == part_name or found not in stored:
                renamed[found] = part
    return renamed


# Tensors of a quantized layer whose second dimension is the outputs', and those that say something of its inputs.
_OUTPUTS_SECOND = ("qweight", "qzeros", "scales")
_OF_INPUTS = ("g_idx", "weight_g_idx", "weight_shape")


def _fused_parts(
    name: str, tensor: StoredTensor, layout: CheckpointNames, outputs: Mapping[str, int]
) -> dict[str, StoredTensor]:
    """The model's tensors that are side by side in `tensor`, which the model would call `name`; empty: it is no such one."""
    layer, _, kind = name.rpartition(".")
    parent, _, last = layer.rpartition(".")
    members = dict(layout.fused).get(last)
    if members is None:
        return {}
    prefix = next((each for each in _candidates(f"{parent}.") if f"{each}{members[0]}" in outputs), None)
    if prefix is None:
        return {}
    sizes = [outputs[f"{prefix}{member}"] for member in members]
    dim = 1 if kind in _OUTPUTS_SECOND else 0
    parts, start = {}, 0
    for member, size in zip(members, sizes, strict=True):
        own_name = f"{prefix}{member}.{kind}"
        if kind in _OF_INPUTS or len(tensor.shape) <= dim:
            parts[own_name] = tensor
            continue
        length, left = divmod(tensor.shape[dim] * size, sum(sizes))
        if left:
            return {}
        parts[own_name] = tensor.take(TensorPart(dim=dim, start=start, length=length))
        start += length
    return parts


def _stacked_parts(name: str, tensor: StoredTensor, layout: CheckpointNames) -> dict[str, StoredTensor]:
    """The tensors of each expert that are stacked in `tensor`, which the model would call `name`; empty: it is no such one."""
    parent, _, last = name.rpartition("experts.")
    for rule in layout.stacked:
        suffix = last.removeprefix(rule.name)
        if last.startswith(rule.name) and suffix in rule.KINDS and len(tensor.shape) >= 2:
            return {
                f"{parent}experts.{part_name}": tensor.take(part)
                for part_name, part in rule.parts(suffix, tensor.shape)
            }
    return {}


def _candidates(name: str) -> tuple[str, str, str]:
    return name, f"model.{name}", name.removeprefix("model.")


def _safetensors_headers(file: Path) -> Iterator[StoredTensor]:
    try:
        _check_header_length(file)
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                header = reader.get_slice(name)
                yield StoredTensor(name, file, tuple(header.get_shape()), header.get_dtype())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {shown_reason(error)}") from error


def _gguf_headers(first: Path) -> dict[str, StoredTensor]:
    """Of all shards; a name that two tensors have is refused with their names in the file."""
    tensors: dict[str, StoredTensor] = {}
    for named in readable_tensors(read_gguf(first)):
        if named.name in tensors:
            raise CheckpointError(f"{first} holds two tensors for {shown_name(named.name)}")
        stored = named.stored
        tensors[named.name] = GgufStoredTensor(
            named.name, stored.file, stored.shape, float_type(stored.kind), named=named
        )
    return tensors


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
        self._gguf = GgufReader()
        self._scales: tuple[tuple[Path, str], torch.Tensor] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read_blocks(self, name: str, rows: slice, columns: slice) -> Blocks:
        """A part of a quantized tensor of a GGUF file, as it is stored."""
        tensor = self._tensors[name]
        if not isinstance(tensor, GgufStoredTensor):
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} is not of a GGUF file, as config.json says"
            )
        return self._gguf.blocks(tensor.named, rows, columns)

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """A view of the mapped file: nothing but the part is read. The map stays as long as the view is held."""
        tensor = self._tensors[name]
        if isinstance(tensor, GgufStoredTensor):
            return self._gguf.read(tensor.named, *index)
        # First: the map is that of one file.
        scales = self._scales_of(tensor) if isinstance(tensor, Float8StoredTensor) else None
        if tensor.file != self._file or self._bytes_read >= _MAPPED_BYTES:
            self._reader = None  # one map at a time
            self._reader = _open_file(tensor.file)
            self._file, self._bytes_read = tensor.file, 0
        part: torch.Tensor
        if tensor.part is not None:
            stored_index = tensor.part.index(index, tensor.stored_shape)
            part = self._reader.get_slice(tensor.name)[stored_index]
        else:
            stored_index = index
            part = self._reader.get_slice(tensor.name)[index] if index else self._reader.get_tensor(tensor.name)
        self._bytes_read += part.nbytes
        if isinstance(tensor, Float8StoredTensor) and scales is not None:
            part = scaled(part, stored_index, tensor, scales)
        return part if tensor.part is None else _of_part(part, tensor.part)

    def _scales_of(self, tensor: Float8StoredTensor) -> torch.Tensor:
        """All of them; those of the last tensor are kept, which is read in pieces."""
        key = tensor.scale.file, tensor.scale.name
        if self._scales is None or self._scales[0] != key:
            if tensor.scale.file != self._file:
                self._reader = None
                self._reader, self._file, self._bytes_read = _open_file(tensor.scale.file), tensor.scale.file, 0
            self._scales = key, self._reader.get_tensor(tensor.scale.name).clone()
        return self._scales[1]


def _of_part(values: torch.Tensor, part: TensorPart) -> torch.Tensor:
    """From what was read of a stored tensor to a part of it."""
    if part.expert is not None:
        values = values.squeeze(0)
    if part.transposed:
        values = values.transpose(-1, -2)
    return values if part.step == 1 else values[(*(slice(None),) * part.dim, slice(None, None, part.step))]


def _open_file(file: Path) -> Any:
    return _TorchReader(file) if file.suffix == ".bin" else safe_open(file, framework="pt", device="cpu")


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
