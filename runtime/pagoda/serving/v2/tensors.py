"""V2 tensors: from JSON values or raw bytes to a checked flat list, and back to raw bytes.

The binary form is the one of the Open Inference Protocol: little-endian numbers in row-major order; a BYTES element is its
length as four little-endian bytes, then the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagoda.errors import InvalidRequestError
from pagoda.serving.json_values import shown

BYTES = "BYTES"
BOOL = "BOOL"
NUMPY_DTYPES: dict[str, str] = {
    BOOL: "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
INTEGER_DATATYPES = frozenset(name for name in NUMPY_DTYPES if "INT" in name)
FLOAT_DATATYPES = frozenset(name for name in NUMPY_DTYPES if name.startswith("FP"))
DATATYPES = (*NUMPY_DTYPES, BYTES)
MAX_DIMENSIONS = 8
_INTEGER_RANGES = {
    name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for name, dtype in NUMPY_DTYPES.items()
    if name in INTEGER_DATATYPES
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the V2 protocol, checked: `len(data) == prod(shape)`, row-major.

    Elements are `str` or `bytes` (BYTES), `bool` (BOOL), `int` or finite `float`, within the range of `datatype`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


def tensor_from_values(name: str, datatype: str, shape: Sequence[int], values: object) -> Tensor:
    """A tensor from JSON-like values: a flat row-major list, or lists nested exactly as `shape` says."""
    dimensions = _checked_shape(name, datatype, shape)
    if not isinstance(values, list):
        raise InvalidRequestError(f"input {name!r}: data must be a list, got {type(values).__name__}", name)
    flat = _flatten(name, values, dimensions)
    if not _are_plainly_right(datatype, flat):
        for value in flat:
            _check_element(name, datatype, value)
    return Tensor(name, datatype, dimensions, flat)


def tensor_from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """A tensor from its binary form."""
    dimensions = _checked_shape(name, datatype, shape)
    count = math.prod(dimensions)
    if datatype == BYTES:
        return Tensor(name, datatype, dimensions, _split_bytes(name, memoryview(raw), count))
    dtype = np.dtype(NUMPY_DTYPES[datatype])
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequestError(
            f"input {name!r}: shape {list(dimensions)} of {datatype} needs {count * dtype.itemsize} bytes, got {len(raw)}",
            name,
        )
    array = np.frombuffer(raw, dtype=dtype)
    if datatype in FLOAT_DATATYPES and not np.isfinite(array).all():
        raise InvalidRequestError(f"input {name!r}: NaN and infinity are not allowed", name)
    return Tensor(name, datatype, dimensions, array.tolist())


def raw_from_tensor(tensor: Tensor) -> bytes:
    """The binary form of a tensor."""
    if tensor.datatype != BYTES:
        return np.asarray(tensor.data, dtype=NUMPY_DTYPES[tensor.datatype]).tobytes()
    pieces: list[bytes] = []
    for element in tensor.data:
        encoded = element.encode() if isinstance(element, str) else element
        pieces += (struct.pack("<I", len(encoded)), encoded)
    return b"".join(pieces)


def text_of(name: str, element: str | bytes) -> str:
    """The text of a BYTES element."""
    if isinstance(element, str):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input {name!r} is not valid UTF-8: {error}", name) from None


def _checked_shape(name: str, datatype: str, shape: Sequence[int]) -> tuple[int, ...]:
    if datatype not in DATATYPES:
        raise InvalidRequestError(
            f"input {name!r}: datatype must be one of {', '.join(DATATYPES)}, got {datatype!r}", name
        )
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(
            f"input {name!r}: at most {MAX_DIMENSIONS} dimensions are allowed, got {len(shape)}", name
        )
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
            raise InvalidRequestError(
                f"input {name!r}: shape must hold integers from 0 to {2**31 - 1}, got {shown(size)}", name
            )
    return tuple(shape)


def _flatten(name: str, values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """`values` as a flat list; nesting, where there is any, must follow `shape`."""
    flat = values
    if list in set(map(type, values)):
        for depth, size in enumerate(shape):
            is_last = depth == len(shape) - 1
            if depth == 0:
                matches = len(flat) == size
            else:
                matches = set(map(type, flat)) <= {list} and all(len(value) == size for value in flat)
                if matches:
                    flat = [element for value in flat for element in value]
            if not matches or (is_last and list in set(map(type, flat))):
                raise InvalidRequestError(f"input {name!r}: data is not nested as shape {list(shape)} says", name)
    if len(flat) != math.prod(shape):
        raise InvalidRequestError(
            f"input {name!r}: shape {list(shape)} needs {math.prod(shape)} elements, got {len(flat)}", name
        )
    return flat


def _are_plainly_right(datatype: str, values: list[Any]) -> bool:
    """Whether all elements are what nearly all are; quick, because a prompt of token ids may have a million of them."""
    types = set(map(type, values))
    if datatype == BYTES:
        return types <= {str, bytes}
    if datatype in INTEGER_DATATYPES and types == {int}:
        low, high = _INTEGER_RANGES[datatype]
        return bool(low <= min(values) and max(values) <= high)
    return False


def _check_element(name: str, datatype: str, value: object) -> None:
    if datatype == BYTES:
        if not isinstance(value, str | bytes):
            raise InvalidRequestError(f"input {name!r}: a BYTES element must be a string, got {shown(value)}", name)
    elif datatype == BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestError(f"input {name!r}: a BOOL element must be true or false, got {shown(value)}", name)
    elif datatype in INTEGER_DATATYPES:
        low, high = _INTEGER_RANGES[datatype]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidRequestError(
                f"input {name!r}: a {datatype} element must be an integer from {low} to {high}, got {shown(value)}",
                name,
            )
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError(
            f"input {name!r}: a {datatype} element must be a finite number, got {shown(value)}", name
        )


def _split_bytes(name: str, raw: memoryview, count: int) -> list[Any]:
    elements: list[bytes] = []
    offset = 0
    while offset < len(raw):
        end = offset + 4
        if end <= len(raw):
            end += struct.unpack_from("<I", raw, offset)[0]
        if end > len(raw):
            raise InvalidRequestError(
                f"input {name!r}: element {len(elements)} of the binary BYTES data ends beyond the data", name
            )
        elements.append(bytes(raw[offset + 4 : end]))
        offset = end
    if len(elements) != count:
        raise InvalidRequestError(f"input {name!r}: shape needs {count} BYTES elements, got {len(elements)}", name)
    return elements
