"""Packed weights kept in a file, which later starts map instead of reading, converting and packing the checkpoint.

    8 bytes   the magic
    32 bytes  SHA-256 of the header
    8 bytes   length of the header, little endian
    header    JSON: {"key", "size", "layers": {layer: {weight: {field: number | tensor}}}, "parameters": {name: tensor}}
    tensors   each from a multiple of 64 bytes on, where its {"dtype", "shape", "offset"} says

A file is written under a name of its own, synchronized, and renamed: it is there as a whole or not at all. Its name is its
key: a digest of the checkpoint's files (names, sizes, times of change), the model as it is configured, the rank's share of
it, and the code that packs. So a file with the right name holds what packing would give. What it holds is trusted like the
checkpoint's own files: neither has a checksum of its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pagoda_kernels
from pagoda import models as pagoda_models
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.packed import LoadedMethod, deferred_layers, layer_name, linear_layers, set_loaded
from pagoda.models.weight_files import weight_files
from pagoda.version import __version__
from pagoda_kernels.mapped_files import MappedFile
from pagoda_kernels.types import PackedWeight

_MAGIC = b"PAGODAW1"
_DIGEST_BYTES, _LENGTH_BYTES = 32, 8
_HEADER_START = len(_MAGIC) + _DIGEST_BYTES + _LENGTH_BYTES
_MAX_HEADER_BYTES = 256 << 20
_ALIGNMENT = 64
_SMALL_BYTES = 1 << 20
_WRITE_BYTES = 8 << 20  # at a time and aligned to it, for the page cache then is of large pages where it can be
_MAX_VECTORS = 1024  # of one writev(2)
_TENSOR = ("dtype", "shape", "offset")


class WeightCacheError(Exception):
    """A file of cached weights that cannot be used; the message says why."""


def cache_key(model: Path, *described_by: object) -> str:
    """The key of the weights that follow from `model`, a checkpoint's directory or file, and what `described_by` says."""
    files = [(file.name, *_identity(file)) for file in weight_files(model)]
    if model.is_dir():
        files += sorted((file.name, *_identity(file)) for file in model.glob("*.json"))
    parts = (files, [repr(each) for each in described_by], __version__, torch.__version__, _code_digest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _code_digest() -> str:
    """Of the code that decides about packed bytes, which may change without the version."""
    folders = [Path(pagoda_kernels.__path__[0]), *(Path(pagoda_models.__path__[0]) / name for name in _PACKING)]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


_PACKING = ("gguf", "layers", "loading", "quantization")


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """A file of cached weights, mapped and checked."""

    mapped: MappedFile
    layers: dict[str, dict[str, PackedWeight]]
    parameters: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.mapped.memory)

    @classmethod
    def open(cls, file: Path, key: str) -> CachedWeights:
        """Raises `FileNotFoundError`; `OSError` where it cannot be mapped; `WeightCacheError` for one that is not whole."""
        mapped = MappedFile(file)
        try:
            header = _read_header(mapped.memory)
            if header["key"] != key or header["size"] != len(mapped.memory):
                raise WeightCacheError(f"it is of other weights or not whole ({len(mapped.memory)} bytes)")
            layers = {
                layer: {
                    name: PackedWeight(**{field: _value(mapped.memory, stored) for field, stored in fields.items()})
                    for name, fields in weights.items()
                }
                for layer, weights in header["layers"].items()
            }
            parameters = {name: _value(mapped.memory, stored) for name, stored in header["parameters"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            mapped.close()
            raise WeightCacheError(f"its header cannot be read: {error!r}"[:200]) from error
        except BaseException:  # raised on: the mapping has no owner yet
            mapped.close()
            raise
        return cls(mapped, layers, parameters)

    def fill(self, model: DecoderForCausalLM) -> None:
        """Give a model that was just built its weights. Raises `WeightCacheError`, before anything is changed, where these
        are not all that it needs."""
        deferred = deferred_layers(model)
        try:
            loaded = [method.with_weights(self.layers[layer_name(layer)]) for layer, method in deferred]
        except KeyError as error:
            raise WeightCacheError(f"it has no weight for {error}") from error
        parameters = _parameters_with_weights(model)
        for name, parameter in parameters.items():
            if name not in self.parameters or self.parameters[name].shape != parameter.shape:
                raise WeightCacheError(f"it does not have what {name} holds")
        self.mapped.populate()
        for name, parameter in parameters.items():
            stored = self.parameters[name]
            if parameter.dtype == stored.dtype and stored.nbytes < _SMALL_BYTES:
                parameter.data.copy_(stored)  # others may have views of it
            else:
                parameter.data = stored
        for (layer, _), method in zip(deferred, loaded, strict=True):
            set_loaded(model, layer, method)


class WeightsToCache:
    """What of a loaded model is written to a file; holds the tensors."""

    def __init__(self, model: DecoderForCausalLM, key: str) -> None:
        """`model`: filled by `load_weights`."""
        self._tensors: list[tuple[int, torch.Tensor]] = []
        self._end = 0
        self._key = key
        self._layers = {
            layer_name(layer): {
                name: {field.name: self._stored(getattr(weight, field.name)) for field in dataclasses.fields(weight)}
                for name, weight in layer.method.weights().items()
            }
            for _, layer in linear_layers(model)
            if isinstance(layer.method, LoadedMethod)
        }
        parameters = _parameters_with_weights(model)
        self._parameters = {name: self._stored(each.data) for name, each in parameters.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self._end

    def write(self, file: Path, stopping: threading.Event) -> bool:
        """Write the file; whether it is there: not if `stopping` was set meanwhile, or if another process is writing it.

        Raises `OSError`; nothing is left of what was written.
        """
        partial = file.with_suffix(".partial")
        _remove_stale(partial)
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            for run in _aligned(self._bytes(), _WRITE_BYTES):
                if stopping.is_set():
                    return False
                _write_all(descriptor, run)
            os.fsync(descriptor)
            partial.rename(file)
            return True
        finally:
            os.close(descriptor)
            partial.unlink(missing_ok=True)

    def _stored(self, value: Any) -> Any:
        """A tensor's place behind the header; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._tensors.append((offset, value))
        self._end = offset + value.nbytes
        return dict(zip(_TENSOR, (str(value.dtype).removeprefix("torch."), list(value.shape), offset), strict=True))

    def _bytes(self) -> Iterator[memoryview]:
        """The file from its beginning, in order."""
        header, start = self._header()
        yield memoryview(header)
        place = len(header)
        for offset, tensor in self._tensors:
            yield memoryview(bytes(start + offset - place))
            yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
            place = start + offset + tensor.nbytes

    def _header(self) -> tuple[bytes, int]:
        """The header and where tensors begin: offsets are written from the file's beginning, which depends on its length."""
        start = 0
        while True:
            text = json.dumps(_shifted(self._described(start), start)).encode()
            needed = -(-(_HEADER_START + len(text)) // _ALIGNMENT) * _ALIGNMENT
            if needed <= start:
                break
            start = needed
        digest = hashlib.sha256(text).digest()
        return _MAGIC + digest + len(text).to_bytes(_LENGTH_BYTES, "little") + text, start

    def _described(self, start: int) -> dict[str, Any]:
        return {
            "key": self._key,
            "size": start + self._end,
            "layers": self._layers,
            "parameters": self._parameters,
        }


def _parameters_with_weights(model: DecoderForCausalLM) -> dict[str, torch.nn.Parameter]:
    """What the model holds of the checkpoint besides packed weights, each parameter once.

    Raises `WeightCacheError` for a model that keeps weights in anything else.
    """
    parameters = dict(model.named_parameters())
    places = {each.untyped_storage().data_ptr() for each in parameters.values()}
    for name, target in model.weight_targets().items():
        if target.destination.untyped_storage().data_ptr() not in places:
            raise WeightCacheError(f"{name} is kept in no parameter of the model")
    return parameters


def _shifted(described: Any, start: int) -> Any:
    """The same with offsets from the beginning of the file."""
    if not isinstance(described, dict):
        return described
    if set(described) == set(_TENSOR):
        return {**described, "offset": described["offset"] + start}
    return {name: _shifted(value, start) for name, value in described.items()}


def _read_header(memory: torch.Tensor) -> Any:
    head = bytes(memory[:_HEADER_START].numpy())
    length = int.from_bytes(head[-_LENGTH_BYTES:], "little")
    if head[: len(_MAGIC)] != _MAGIC or length > min(_MAX_HEADER_BYTES, len(memory)):
        raise WeightCacheError("it is no file of packed weights")
    text = bytes(memory[_HEADER_START : _HEADER_START + length].numpy())
    if hashlib.sha256(text).digest() != head[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]:
        raise WeightCacheError("its header is damaged")
    return json.loads(text)


def _value(memory: torch.Tensor, stored: Any) -> Any:
    """What `WeightsToCache._stored` described; a view of `memory`. Raises `ValueError` for one that is not inside."""
    if not isinstance(stored, dict):
        return stored
    dtype, shape, offset = getattr(torch, stored["dtype"]), stored["shape"], stored["offset"]
    end = offset + math.prod(shape) * dtype.itemsize
    if offset % _ALIGNMENT or not 0 <= offset <= end <= len(memory):
        raise ValueError(f"a tensor from {offset} to {end} of {len(memory)} bytes")
    return memory[offset:end].view(dtype).view(shape)


def _aligned(parts: Iterator[memoryview], size: int) -> Iterator[list[memoryview]]:
    """The bytes of `parts` in runs of `size`, the last one excepted, without copying them."""
    run: list[memoryview] = []
    missing = size
    for part in parts:
        while part:
            run.append(part[:missing])
            part = part[missing:]
            missing -= len(run[-1])
            if missing == 0:
                yield run
                run, missing = [], size
    if run:
        yield run


def _write_all(descriptor: int, run: list[memoryview]) -> None:
    """Write without the interpreter's lock: this thread goes last, and must not keep it while it waits for its turn."""
    while run:
        count = os.writev(descriptor, run[:_MAX_VECTORS])
        while run and count >= len(run[0]):
            count -= len(run.pop(0))
        if count:
            run[0] = run[0][count:]


STALE_SECONDS = 600.0
"""A file that was being written and has not grown for so long is one whose writer was killed."""


def _remove_stale(partial: Path, now: Callable[[], float] = time.time) -> None:
    with suppress(FileNotFoundError):
        if now() - partial.stat().st_mtime > STALE_SECONDS:
            partial.unlink()
