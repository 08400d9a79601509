"""Tensors of GGUF files as the loader asks for them: by the names of the checkpoint, as floats or as they are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import torch

from pagoda.errors import CheckpointError
from pagoda.models.gguf.architectures import NamedTensor, named_tensors
from pagoda.models.gguf.blocks import Blocks, unpack_blocks
from pagoda.models.gguf.ggml_types import GgmlType
from pagoda.models.gguf.reader import GgufFile

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def float_type(kind: GgmlType) -> str:
    """The float type, as safetensors spells it, that `GgufReader.read` gives of a tensor."""
    return kind.name if kind.stored == "float" else "F32"


def readable_tensors(file: GgufFile) -> Iterator[NamedTensor]:
    """The tensors of a file. Raises `CheckpointError` for one that no model has."""
    for named in named_tensors(file):
        if named.stored.kind.stored != "float" and len(named.stored.shape) < 2:
            raise CheckpointError(f"{file.path}: {named.stored.name} is {named.stored.kind.name} with one dimension")
        yield named


class GgufReader:
    """Reads parts of tensors; for one thread. Not mapped: a file that is cut off meanwhile is an error then, and no SIGBUS."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: FileIO | None = None

    def read(self, tensor: NamedTensor, *index: slice) -> torch.Tensor:
        """A part of a tensor, one slice a dimension, or all of it: in its float type, or dequantized to float32."""
        shape, kind = tensor.stored.shape, tensor.stored.kind
        rows, *others = index or (slice(0, shape[0]),)
        data = self._rows(tensor, rows)
        if kind.stored == "float":
            values = data.view(_FLOATS[kind.name]).view(-1, *shape[1:])[(slice(None), *others)]
            return values - tensor.offset if tensor.offset else values
        if len(shape) == 2 and others:
            return self._columns(tensor, data, others[0]).floats()
        row_bytes = shape[-1] // kind.block * kind.nbytes
        return unpack_blocks(kind, data.view(-1, row_bytes)).floats().view(-1, *shape[1:])[(slice(None), *others)]

    def blocks(self, tensor: NamedTensor, rows: slice, columns: slice) -> Blocks:
        """A part of a quantized tensor of two dimensions; `columns` begins and ends with a group."""
        return self._columns(tensor, self._rows(tensor, rows), columns)

    def _columns(self, tensor: NamedTensor, data: torch.Tensor, columns: slice) -> Blocks:
        kind = tensor.stored.kind
        begin, end = columns.start or 0, tensor.stored.shape[-1] if columns.stop is None else columns.stop
        first = begin // kind.block
        whole = unpack_blocks(kind, data[:, first * kind.nbytes : -(-end // kind.block) * kind.nbytes])
        begin, end = begin - first * kind.block, end - first * kind.block
        if begin == 0 and end == whole.values.shape[1]:
            return whole
        groups = slice(begin // kind.group, -(-end // kind.group))
        plain = whole.in_one_level()
        return Blocks(
            plain.values[:, begin:end],
            plain.scales[:, groups],
            None if plain.mins is None else plain.mins[:, groups],
            plain.zero,
            kind.group,
        )

    def _rows(self, tensor: NamedTensor, rows: slice) -> torch.Tensor:
        """The bytes of some of the first dimension, in the checkpoint's order: uint8 [rows, bytes of a row]."""
        start, stop = rows.start or 0, tensor.stored.shape[0] if rows.stop is None else rows.stop
        heads = tensor.interleaved_heads
        if not heads:
            return self._bytes(tensor, start, stop)
        # A head's rows are 0, d / 2, 1, d / 2 + 1, … of the checkpoint: https://arxiv.org/abs/2104.09864 pairs neighbours.
        size = tensor.stored.shape[0] // heads
        first, last = start // size, -(-stop // size)
        data = self._bytes(tensor, first * size, last * size)
        in_order = data.view(last - first, size // 2, 2, -1).transpose(1, 2).reshape(data.shape)
        return in_order[start - first * size : stop - first * size]

    def _bytes(self, tensor: NamedTensor, start: int, stop: int) -> torch.Tensor:
        stored = tensor.stored
        row_bytes = stored.nbytes // stored.shape[0]
        data = torch.empty((stop - start, row_bytes), dtype=torch.uint8)
        file = self._opened(stored.file)
        file.seek(stored.start + start * row_bytes)
        view = data.numpy().reshape(-1).data
        while len(view):
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{stored.file} has been cut off since it was opened")
            view = view[count:]
        return data

    def _opened(self, path: Path) -> FileIO:
        if self._file is None or path != self._path:
            self.close()
            try:
                self._file, self._path = FileIO(path), path
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        assert self._file is not None
        return self._file

    def close(self) -> None:
        """Give the file back; the next read opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = None

    __del__ = close
