"""The one way to a checkpoint's files. A checkpoint may come from anyone, so what is read of it is bounded.

A name is taken only if it is that of a regular file inside the checkpoint's directory, wherever links lead. JSON is bounded in
bytes, values, nesting and digits before Python objects are made of it. Each fault is a `CheckpointError` that names the file.

Where the checkpoint is a GGUF file, that file is given as its directory, and holds what `models.gguf.files` derives from it.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.gguf.files import DERIVED, derived_file, is_gguf

MAX_JSON_BYTES = 16 << 20
MAX_JSON_VALUES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_NUMBER_DIGITS = 400  # more than any number of 64 bits has in decimal

MAX_NAMES_IN_ERROR = 8

_shortener = reprlib.Repr()
_shortener.maxlevel = 3
_shortener.maxstring = _shortener.maxother = 80
_shortener.maxlong = 40


def shown(value: object) -> str:
    """`repr` of a value from a checkpoint, short enough for an error message."""
    return _shortener.repr(value)


def shown_name(name: str) -> str:
    """A name from a checkpoint as it is; shortened, and in quotes, where it would not look like a name."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def shown_reason(error: BaseException) -> str:
    """A library's error about a file, in one line of bounded length: it may quote the file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 and text.isprintable() else shown(text)


def checkpoint_file(directory: Path, name: str) -> Path:
    """The path of the regular file `name` of the checkpoint in `directory`.

    Raises `CheckpointError`: there is none; it is a directory, a pipe, a socket or a device; `name` is absolute or climbs with
    `..`; or a link leads out of `directory` (and of the blobs, where that is a snapshot in the Hugging Face cache).
    """
    path = directory / _checked_name(directory, name)
    target = os.path.realpath(path)
    if not any(_is_inside(target, root) for root in _roots(directory)):
        raise CheckpointError(
            f"{path} is a link to {shown_name(target)}, outside of the checkpoint; "
            f"links must stay inside {directory}, copy the file into it"
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: a checkpoint directory must hold {shown_name(path.name)}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is {_kind(mode)}: it must be a regular file")
    return path


def has_file(directory: Path, name: str) -> bool:
    """Whether `directory` has an entry of that name, even one of a kind that `checkpoint_file` refuses."""
    checked = _checked_name(directory, name)
    return checked in DERIVED if is_gguf(directory) else os.path.lexists(directory / checked)


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint at `path`: a directory, or a file, which then must be GGUF."""
    return path.is_dir() or is_gguf(path)


def names_ending_with(directory: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The names in `directory` with one of these endings, sorted; those of subdirectories are not among them."""
    if is_gguf(directory):
        return sorted(name for name in DERIVED if name.endswith(suffixes))
    try:
        return sorted(name for name in os.listdir(directory) if name.endswith(suffixes))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error


def read_file(directory: Path, name: str, max_bytes: int) -> bytes:
    """The content of a file of the checkpoint; raises as `checkpoint_file`, and for one of more than `max_bytes`."""
    if is_gguf(directory):
        return _read_derived(directory, name, max_bytes)
    path = checkpoint_file(directory, name)
    try:
        # Without O_NONBLOCK a pipe that took the file's place since would be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CheckpointError(f"{path} has {size} bytes; at most {max_bytes} are allowed")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_derived(file: Path, name: str, max_bytes: int) -> bytes:
    data = derived_file(file, _checked_name(file, name))
    if data is None:
        raise CheckpointError(f"{file} is a GGUF file, which has no {shown_name(name)}; it has {', '.join(DERIVED)}")
    if len(data) > max_bytes:
        raise CheckpointError(f"{name} of {file} has {len(data)} bytes; at most {max_bytes} are allowed")
    return data


def read_text(directory: Path, name: str, max_bytes: int) -> str:
    """The content of a text file of the checkpoint; raises as `read_file`, and for one that is not UTF-8."""
    data = read_file(directory, name, max_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{directory / name} is not UTF-8: {error}") from error


def read_json_object(directory: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint.

    Raises `CheckpointError`: as `read_file`, or the file is not JSON, holds no object, or is beyond the bounds above. Numbers
    that JSON does not know (NaN, Infinity), which Python writes, are read; who wants a number checks that it is finite.
    """
    path = directory / name
    text = read_text(directory, name, max_bytes)
    # An empty object takes two bytes in the file and 64 in memory; what is in strings is counted too, which does no harm.
    num_values = text.count(",") + text.count("[") + text.count("{")
    if num_values > MAX_JSON_VALUES:
        raise CheckpointError(f"{path} holds about {num_values} values; at most {MAX_JSON_VALUES} are allowed")
    number = _NumberReader(path)
    try:
        value = json.loads(
            text,
            parse_int=number.integer,
            parse_float=number.decimal,
            object_pairs_hook=lambda pairs: _without_duplicates(path, pairs),
        )
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    _check_nesting_and_text(path, value)
    return value


class _NumberReader:
    """Python takes seconds for an integer of a million digits, and refuses one of 5000 with an error of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def integer(self, digits: str) -> int:
        return int(self._checked(digits))

    def decimal(self, digits: str) -> float:
        return float(self._checked(digits))

    def _checked(self, digits: str) -> str:
        if len(digits) > MAX_NUMBER_DIGITS:
            raise CheckpointError(
                f"{self._path} holds a number of {len(digits)} digits; at most {MAX_NUMBER_DIGITS} are allowed"
            )
        return digits


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{path} has the key {shown(twice)} twice; a key may occur once in an object")
    return values


def _check_nesting_and_text(path: Path, value: object) -> None:
    """Refuse what is nested too deeply, and strings with half of a surrogate pair, which no other library takes."""
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        if not level:
            return
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                _check_text(path, item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(path, key)
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    raise _too_deep(path)


def _check_text(path: Path, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{path} has the string {shown(text)}, which is not valid Unicode") from None


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is nested too deeply; at most {MAX_JSON_DEPTH} levels are allowed")


def _checked_name(directory: Path, name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or not name.isprintable() or len(name) > 255:
        raise CheckpointError(
            f"{directory} names the file {shown(name)}; a file of a checkpoint must be named relative to its directory, "
            "without .., in up to 255 printable characters"
        )
    return name


def _roots(directory: Path) -> Iterator[str]:
    """Where files of the checkpoint may lie, without links in the way."""
    real = os.path.realpath(directory)
    yield real
    # models--owner--name/snapshots/revision/config.json is a link to models--owner--name/blobs/hash.
    repository, snapshots = os.path.split(os.path.dirname(real))
    if snapshots == "snapshots" and os.path.basename(repository).startswith("models--"):
        yield os.path.join(repository, "blobs")


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _kind(mode: int) -> str:
    kinds: Iterable[tuple[bool, str]] = (
        (stat.S_ISDIR(mode), "a directory"),
        (stat.S_ISFIFO(mode), "a pipe"),
        (stat.S_ISSOCK(mode), "a socket"),
    )
    return next((name for is_it, name in kinds if is_it), "a device")
