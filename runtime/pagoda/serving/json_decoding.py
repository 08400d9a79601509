"""JSON bodies to values, at a cost that is known before anything is built.

orjson keeps the interpreter lock from a body's first byte to its last, and two bytes (`1,`) may become forty in Python. So
a large body is looked through first, in pieces, with numpy, which neither keeps the lock nor makes an object for each
value:

    {"prompt": [[257,13,…,9],[11,…,4]], "stop": ["\\n", "END"], "max_tokens": 16}
                └── runs of numbers ──┘     └─ values, lists, objects and strings: counted ─┘

A long run of numbers can only be token ids. Runs are cut out, decoded a piece at a time, and are `TokenIds` from then on.
What is left is counted, and refused where it would take too much memory, before orjson sees it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from pagoda.config.sizes import exact_bytes
from pagoda.errors import ContextLengthError, InvalidRequestError, RequestTooLargeError
from pagoda.request import MAX_TOKEN_ID, TokenIds

LARGE_BYTES = 2**16
"""A body up to here is decoded as it is: whatever it holds takes a few megabytes and milliseconds."""
MAX_VALUES = 2**18
MAX_CONTAINERS = 2**15
"""Lists and objects. A message of a conversation has some, a tool some dozens."""
MAX_RUNS = 2**12
MIN_RUN_BYTES = 256
FEW_NUMBERS = 2**14
"""So many in all runs of a body are left as they are: they need not be ids."""
MEMORY_RATIO = 2
MEMORY_ALLOWANCE = 2 * 2**20
"""Values may take so many times the body's bytes, and so many more, beside the characters of its strings."""
BYTES_A_VALUE = 40
BYTES_A_STRING = 64
BYTES_A_LIST = 88
BYTES_AN_OBJECT = 264

_PIECE = 2**16
_RUN_PIECE = 2**15
_COMMA, _QUOTE, _OPEN_LIST, _CLOSE_LIST, _OPEN_OBJECT = b',"[]{'
_IS_STRUCTURE = np.isin(np.arange(256), np.frombuffer(b'[]{}:"', np.uint8))


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """What the model sets a limit to: the characters of one string, the token ids of a body. None: no limit."""

    max_characters: int | None = None
    max_token_ids: int | None = None


NO_LIMITS = JsonLimits()


def loads(body: bytes | bytearray | memoryview, limits: JsonLimits = NO_LIMITS) -> Any:
    """The value of a JSON text. In a large one, long lists of nothing but numbers are `TokenIds`.

    Raises `orjson.JSONDecodeError`, `RequestTooLargeError` for what would cost too much, and `InvalidRequestError` for what no
    model can need: too long a string, too many ids, a long list of numbers that are no ids.
    """
    if len(body) <= LARGE_BYTES:
        return orjson.loads(body)
    view = memoryview(body)
    scan = _Scan(view, limits.max_characters or len(view))
    _check(scan, view, limits)
    if scan.num_run_values <= FEW_NUMBERS:
        return orjson.loads(view)
    # Strings that no client can guess stand where the runs were.
    mark, text, end = uuid.uuid4().hex, bytearray(), 0
    arrays: dict[str, TokenIds] = {}
    for start, stop in scan.runs:
        name = f"{mark}{start}"
        text += view[end:start]
        text += f'"{name}"'.encode()
        arrays[name] = _token_ids(view[start + 1 : stop])
        end = stop + 1
    text += view[end:]
    return _with_arrays(orjson.loads(text), arrays)


class _Scan:
    """Counts of a JSON text, or of its beginning where that is enough to refuse it; of what is no JSON they mean nothing.

    `runs`: from bracket to bracket, lists of more than `MIN_RUN_BYTES` with neither lists, objects nor strings in them.
    `long_strings`: from quote to quote, strings of more than `long_bytes`. The counts are of everything, runs too.
    """

    def __init__(self, view: memoryview, long_bytes: int) -> None:
        self.runs: list[tuple[int, int]] = []
        self.long_strings: list[tuple[int, int]] = []
        self.num_commas = self.num_lists = self.num_objects = self.num_strings = self.num_run_values = 0
        self._long_bytes = long_bytes
        self._open_quote: int | None = None
        self._last_structure = (0, 0)  # its place and its byte
        offset = 0
        while offset < len(view):
            piece = bytes(view[offset : offset + _PIECE])
            if b"\\" in piece:
                if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                    piece += view[offset + len(piece) : offset + len(piece) + 1]  # an escape is not cut in two
                piece = piece.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
            self._add(np.frombuffer(piece, np.uint8), offset)
            offset += len(piece)
            if self.num_lists + self.num_objects > MAX_CONTAINERS or self.num_strings > MAX_VALUES:
                break

    def _add(self, piece: npt.NDArray[np.uint8], offset: int) -> None:
        is_quote = piece == _QUOTE
        quotes = np.flatnonzero(is_quote)
        if len(quotes) or self._open_quote is not None:
            is_inside = np.cumsum(is_quote, dtype=np.uint8) & 1 == (self._open_quote is None)
            piece = np.where(is_inside, 0, piece)  # of a string its last quote is left
            self._note_strings(quotes + offset)
        self.num_commas += int(np.count_nonzero(piece == _COMMA))
        places = np.flatnonzero(_IS_STRUCTURE[piece])
        if not len(places):
            return
        kinds = piece[places]
        self.num_lists += int(np.count_nonzero(kinds == _OPEN_LIST))
        self.num_objects += int(np.count_nonzero(kinds == _OPEN_OBJECT))
        self.num_strings += int(np.count_nonzero(kinds == _QUOTE))
        last_place, last_kind = self._last_structure
        places = np.concatenate(([last_place], places + offset))
        kinds = np.concatenate(([last_kind], kinds))
        is_run = (kinds[:-1] == _OPEN_LIST) & (kinds[1:] == _CLOSE_LIST) & (np.diff(places) > MIN_RUN_BYTES)
        for index in np.flatnonzero(is_run).tolist():
            self.runs.append((int(places[index]), int(places[index + 1])))
        self._last_structure = int(places[-1]), int(kinds[-1])

    def _note_strings(self, quotes: npt.NDArray[np.intp]) -> None:
        if self._open_quote is not None:
            quotes = np.concatenate(([self._open_quote], quotes))
        self._open_quote = int(quotes[-1]) if len(quotes) % 2 else None
        begins, ends = quotes[: len(quotes) // 2 * 2].reshape(-1, 2).T
        for index in np.flatnonzero(ends - begins - 1 > self._long_bytes).tolist():
            self.long_strings.append((int(begins[index]), int(ends[index])))


def _check(scan: _Scan, view: memoryview, limits: JsonLimits) -> None:
    """Refuse what would cost more than a body of this size may, or more than the model can need."""
    if len(scan.runs) > MAX_RUNS:
        raise RequestTooLargeError(f"the body has {len(scan.runs)} lists of numbers; at most {MAX_RUNS} are allowed")
    num_containers = scan.num_lists + scan.num_objects
    if num_containers > MAX_CONTAINERS:
        raise RequestTooLargeError(f"the body has more than the {MAX_CONTAINERS} lists and objects that are allowed")
    num_ids = scan.num_run_values = sum(_num_commas(view[start:stop]) + 1 for start, stop in scan.runs)
    if limits.max_token_ids is not None and num_ids > limits.max_token_ids:
        raise InvalidRequestError(f"the body has {num_ids} token ids; at most {limits.max_token_ids} are allowed")
    num_values = scan.num_commas - num_ids + num_containers
    if max(num_values, scan.num_strings) > MAX_VALUES:
        raise RequestTooLargeError(f"the body has more than the {MAX_VALUES} values beside token ids that are allowed")
    memory = num_values * BYTES_A_VALUE + scan.num_strings * BYTES_A_STRING
    memory += scan.num_lists * BYTES_A_LIST + scan.num_objects * BYTES_AN_OBJECT
    allowed = MEMORY_RATIO * len(view) + MEMORY_ALLOWANCE
    if memory > allowed:
        raise RequestTooLargeError(
            f"the body of {exact_bytes(len(view))} has {num_values} values beside token ids; they take {exact_bytes(memory)}; "
            f"at most {MEMORY_RATIO} times the body and {exact_bytes(MEMORY_ALLOWANCE)} more are allowed"
        )
    for start, end in scan.long_strings:
        num_characters = _least_characters(view[start + 1 : end])
        if limits.max_characters is not None and num_characters > limits.max_characters:
            raise ContextLengthError(
                f"the body has a string of at least {num_characters} characters, and the context holds "
                f"{limits.max_characters} at most"
            )


def _num_commas(view: memoryview) -> int:
    data = np.frombuffer(view, np.uint8)
    return sum(int(np.count_nonzero(data[begin : begin + _PIECE] == _COMMA)) for begin in range(0, len(data), _PIECE))


def _least_characters(view: memoryview) -> int:
    """Characters of a string as JSON, at least: twelve bytes of escapes may be one."""
    count = 0.0
    for begin in range(0, len(view), _PIECE):
        piece = np.frombuffer(view[begin : begin + _PIECE], np.uint8)
        count += np.count_nonzero((piece & 0xC0) != 0x80) - 5.5 * np.count_nonzero(piece == ord("\\"))
    return max(0, int(count))


def _token_ids(view: memoryview) -> TokenIds:
    """The ids between two brackets. Raises `orjson.JSONDecodeError`, and `InvalidRequestError` for numbers that are no ids."""
    ids = np.empty(_num_commas(view) + 1, np.int32)
    count = begin = 0
    while begin <= len(view):
        piece = bytes(view[begin : begin + _RUN_PIECE])
        if begin + len(piece) < len(view):
            end = piece.rfind(b",")
            if end < 0:
                raise InvalidRequestError(f"the body has a number of more than {_RUN_PIECE} bytes")
            piece = piece[:end]
        numbers = orjson.loads(b"[" + piece + b"]")
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > MAX_TOKEN_ID:
            raise InvalidRequestError(
                f"the body has a list of {len(ids)} numbers that are not all token ids: integers from 0 to {MAX_TOKEN_ID}"
            )
        ids[count : count + len(numbers)] = numbers
        count += len(numbers)
        begin += len(piece) + 1
    return TokenIds(ids)


def _with_arrays(value: Any, arrays: dict[str, TokenIds]) -> Any:
    """`value` with the arrays where their names are."""
    if isinstance(value, str):
        return arrays.get(value, value)
    if isinstance(value, list):
        return [_with_arrays(item, arrays) for item in value]
    if isinstance(value, dict):
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return value
