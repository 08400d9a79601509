"""The header of a GGUF file: metadata, and which tensors are where (the GGUF specification in ggml's docs, versions 2 and 3).

    "GGUF"  version u32  tensors u64  keys u64
    keys     × { name, type u32, value }                          strings are a length u64 and UTF-8
    tensors  × { name, dims u32, sizes u64 × dims, type u32, offset u64 }        the fastest dimension first
    padding to a multiple of general.alignment; then tensor data, at offsets from here

A file may come from anyone. Every length, count and offset is checked against the file's size and the bounds below before
anything is read or made of it, in one pass over the header; each fault is a `CheckpointError` that names the file. Arrays, of
which vocabularies are made, are walked over, and read only when they are asked for.

An own reader and not the package `gguf`: that one makes a numpy array of every number and string of the header, which takes
seconds for a vocabulary, believes its counts, and needs packages that nothing else here needs. The tests compare with it.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pagoda.errors import CheckpointError, shown
from pagoda.models.gguf.ggml_types import BY_NUMBER, GgmlType, name_of

SUFFIX = ".gguf"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 << 20  # vocabularies of 256 k tokens take 12 MiB
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_VALUES = 1 << 21  # of all arrays
MAX_DIMENSIONS = 4
MAX_SHARDS = 1 << 10
MAX_VALUES = 1 << 48  # of a tensor

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata that was not read: numbers of the type `kind`, or strings."""

    file: Path
    kind: int
    start: int
    count: int

    def numbers(self) -> list[Any]:
        """Its numbers. Raises `CheckpointError` where it holds strings."""
        if self.kind == _STRING:
            raise CheckpointError(f"{self.file}: an array of strings where one of numbers must be")
        form = struct.Struct(f"<{self.count}{_NUMBERS[self.kind].format[1:]}")
        with _mapped(self.file) as data:
            if self.start + form.size > len(data):
                raise CheckpointError(f"{self.file} has been cut off since it was opened")
            return list(form.unpack_from(data, self.start))

    def strings(self) -> list[str]:
        """Its strings. Raises `CheckpointError` where it holds numbers, and for one that is not UTF-8."""
        if self.kind != _STRING:
            raise CheckpointError(f"{self.file}: an array of numbers where one of strings must be")
        with _mapped(self.file) as data:
            cursor = _Cursor(self.file, data, self.start)
            try:
                return [data[begin:end].decode("utf-8") for begin, end in cursor.strings(self.count, "an array")]
            except UnicodeDecodeError as error:
                raise cursor.error(f"a string of an array is not UTF-8: {error.reason}") from None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a file: `shape` with the slowest dimension first, as torch has it; `start` from the file's beginning."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: GgmlType
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """A GGUF file, all of its shards together: metadata of the first, tensors of all. Numbers, strings and `GgufArray`s."""

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key. Raises `CheckpointError`: it is missing and there is no default, or of another type."""
        value = self.metadata.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "is missing" if value is None else f"is {shown(value)}"
            raise CheckpointError(f"{self.path}: {key} {found}; it must be {_KINDS[kind]}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """As `value`; None where the key is missing."""
        return None if self.metadata.get(key) is None else self.value(key, kind)


_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    GgufArray: "an array",
}


def read_gguf(path: Path) -> GgufFile:
    """The header of the GGUF file `path`, or of the file whose first shard it is (`NAME-00001-of-0000N.gguf`).

    Raises `CheckpointError`: it is no GGUF file, a shard is missing, it is cut off, or something in it is beyond the bounds.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _read(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=4)
def _read(path: Path, _version: tuple[int, ...]) -> GgufFile:
    first = _read_header(path)
    metadata, tensors = first
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 1 <= count <= MAX_SHARDS:
        raise CheckpointError(f"{path}: split.count is {shown(count)}; it must be an integer from 1 to {MAX_SHARDS}")
    files = _shards(path, count, metadata.get("split.no", 0))
    merged = dict(tensors)
    for number, file in enumerate(files[1:], 1):
        others, tensors = _read_header(file)
        if (others.get("split.no"), others.get("split.count")) != (number, count):
            raise CheckpointError(f"{file} is not shard {number + 1} of {count} of {path}")
        for name, tensor in tensors.items():
            if name in merged:
                raise CheckpointError(f"tensor {shown(name)} is in both {merged[name].file} and {file}")
            merged[name] = tensor
    expected = metadata.get("split.tensors.count", len(merged))
    if count > 1 and expected != len(merged):
        raise CheckpointError(
            f"{path}: its {count} shards hold {len(merged)} tensors, split.tensors.count is {shown(expected)}"
        )
    return GgufFile(path, tuple(files), metadata, merged)


def _shards(path: Path, count: int, number: object) -> list[Path]:
    if count == 1:
        return [path]
    named = _SHARD_NAME.fullmatch(path.name)
    if named is None or int(named[3]) != count or int(named[2]) != 1 or number != 0:
        first = f"{named[1]}-00001-of-{count:05}{SUFFIX}" if named is not None else f"NAME-00001-of-{count:05}{SUFFIX}"
        raise CheckpointError(
            f"{path} is one of {count} shards: name the first one, {first}, beside which the others must be"
        )
    files = [path.with_name(f"{named[1]}-{shard:05}-of-{count:05}{SUFFIX}") for shard in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} is one of {count} shards; missing: {missing[0]}{more}")
    return files


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes. Without O_NONBLOCK a pipe of that name would be waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file: a GGUF file must be one")
            if not status.st_size:
                raise CheckpointError(f"{path} is empty")
            data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    with data:
        yield data


class _Cursor:
    """Reads one thing after another, each checked against what is left of the header."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self._path = path
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)
        self.position = position

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a sound GGUF file: {problem}")

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes; returns where they begin."""
        begin = self.position
        if count > self._end - begin:
            if self._end == MAX_HEADER_BYTES:
                raise self.error(f"its header has more than {MAX_HEADER_BYTES} bytes, as many as are allowed")
            raise self.error(f"it is cut off, or {what} is longer than the file")
        self.position = begin + count
        return begin

    def number(self, form: struct.Struct, what: str) -> Any:
        return form.unpack_from(self._data, self.skip(form.size, what))[0]

    def count(self, most: int, what: str) -> int:
        count: int = self.number(_U64, what)
        if count > most:
            raise self.error(f"it names {count} {what}; at most {most} are allowed")
        return count

    def text(self, most: int, what: str) -> str:
        length = self.count(most, f"bytes for {what}")
        start = self.skip(length, what)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}") from None

    def strings(self, count: int, what: str) -> Iterator[tuple[int, int]]:
        """Where each of `count` strings begins and ends: `text` without its calls, which there are half a million of."""
        data, limit, position, length_at = self._data, self._end, self.position, _U64.unpack_from
        for _ in range(count):
            begin = position + _U64.size
            if begin > limit:
                self.skip(limit + 1 - self.position, what)
            (length,) = length_at(data, position)
            if length > MAX_STRING_BYTES:
                raise self.error(
                    f"it names {length} bytes for a string in {what}; at most {MAX_STRING_BYTES} are allowed"
                )
            self.position = position = begin + length
            if position > limit:
                self.position = begin
                self.skip(length, what)
            yield begin, position

    def name(self, what: str) -> str:
        name = self.text(MAX_NAME_BYTES, what)
        if not name or not name.isprintable():
            raise self.error(f"{what} is {shown(name)}; it must be printable and not empty")
        return name


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    with _mapped(path) as data:
        if data[:4] != _MAGIC:
            raise CheckpointError(
                f"{path} is no GGUF file (it begins with {bytes(data[:4])!r}): a checkpoint is a GGUF file, or a directory "
                "with config.json and *.safetensors"
            )
        cursor = _Cursor(path, data, len(_MAGIC))
        version = cursor.number(_U32, "its version")
        if version not in VERSIONS:
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            found = "big-endian" if is_swapped else f"of version {version}"
            raise cursor.error(f"it is {found}; versions 2 and 3 are read, little-endian")
        num_tensors = cursor.count(MAX_TENSORS, "tensors")
        num_keys = cursor.count(MAX_KEYS, "metadata keys")
        metadata = _read_metadata(path, cursor, num_keys)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment is {shown(alignment)}; it must be a power of two of at most 65536")
        infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
        begin = -(-cursor.position // alignment) * alignment
        return metadata, _placed(path, cursor.error, infos, begin, len(data), alignment)


def _read_metadata(path: Path, cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    num_values = 0
    for _ in range(num_keys):
        key = cursor.name("the name of a metadata key")
        if key in metadata:
            raise cursor.error(f"the metadata key {shown(key)} occurs twice")
        kind = cursor.number(_U32, key)
        if kind in _NUMBERS:
            metadata[key] = cursor.number(_NUMBERS[kind], key)
        elif kind == _STRING:
            metadata[key] = cursor.text(MAX_STRING_BYTES, key)
        elif kind == _ARRAY:
            array = _walk_array(path, cursor, key, MAX_ARRAY_VALUES - num_values)
            num_values += array.count
            metadata[key] = array
        else:
            raise cursor.error(f"the metadata key {shown(key)} is of type {kind}, which does not exist")
    return metadata


def _walk_array(path: Path, cursor: _Cursor, key: str, most: int) -> GgufArray:
    kind = cursor.number(_U32, key)
    count = cursor.count(most, f"values in arrays up to {shown(key)}")
    start = cursor.position
    if kind in _NUMBERS:
        cursor.skip(count * _NUMBERS[kind].size, key)
    elif kind == _STRING:
        for _ in cursor.strings(count, shown(key)):
            pass
    else:
        what = "of arrays, which is not supported" if kind == _ARRAY else f"of type {kind}, which does not exist"
        raise cursor.error(f"the metadata key {shown(key)} is an array {what}")
    return GgufArray(path, kind, start, count)


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type and offset."""
    name = cursor.name("the name of a tensor")
    num_dimensions = cursor.number(_U32, name)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"tensor {shown(name)} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    sizes = [cursor.number(_U64, name) for _ in range(num_dimensions)]
    number = cursor.number(_U32, name)
    return name, tuple(reversed(sizes)), number, cursor.number(_U64, name)


def _placed(
    path: Path,
    error: Callable[[str], CheckpointError],
    infos: list[tuple[str, tuple[int, ...], int, int]],
    begin: int,
    size: int,
    alignment: int,
) -> dict[str, GgufTensor]:
    """The tensors by name; no two of them share a byte, so that a small file cannot stand for a large model."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in infos:
        if name in tensors:
            raise error(f"tensor {shown(name)} occurs twice")
        kind = BY_NUMBER.get(number)
        if kind is None:
            allowed = ", ".join(known.name for known in BY_NUMBER.values())
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is of type {name_of(number)}, which is not supported; supported: {allowed}"
            )
        num_values = 1
        for length in shape:
            num_values *= length
        if not 1 <= num_values <= MAX_VALUES or shape[-1] % kind.block:
            raise error(
                f"tensor {shown(name)} has the shape {list(shape)}; no size may be 0, the last must be a multiple of "
                f"{kind.block} ({kind.name}), and all together at most {MAX_VALUES}"
            )
        nbytes = num_values // kind.block * kind.nbytes
        if offset % alignment:
            raise error(
                f"tensor {shown(name)} is at offset {offset}, which is no multiple of the alignment, {alignment}"
            )
        if offset > size - begin or nbytes > size - begin - offset:
            raise error(
                f"it is cut off: tensor {shown(name)} ends at byte {begin + offset + nbytes}, the file at {size}"
            )
        tensors[name] = GgufTensor(name, path, shape, kind, begin + offset, nbytes)
    end, before = begin, ""
    for tensor in sorted(tensors.values(), key=lambda each: each.start):
        if tensor.start < end:
            raise error(f"tensors {shown(before)} and {shown(tensor.name)} share bytes of the file")
        end, before = tensor.start + tensor.nbytes, tensor.name
    return tensors
