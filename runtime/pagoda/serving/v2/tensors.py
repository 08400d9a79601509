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
import numpy.typing as npt

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import TokenIds

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
MAX_STRINGS = 2**14
"""Elements of a BYTES tensor: 512 prompts, or the stop strings of each."""
MAX_NUMBERS = 2**26
_INTEGER_RANGES = {
    name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for name, dtype in NUMPY_DTYPES.items()
    if name in INTEGER_DATATYPES
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the V2 protocol, checked: `len(data) == prod(shape)`, row-major.

    Elements are `str` or `bytes` (BYTES), `bool` (BOOL), `int` or finite `float`, within the range of `datatype`. Many numbers
    are one array, until `values_of` makes them elements.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | npt.NDArray[Any]


def values_of(data: list[Any] | npt.NDArray[Any]) -> list[Any]:
    """The elements of a tensor, or of a part of one."""
    return data if isinstance(data, list) else data.tolist()


def tensor_from_values(name: str, datatype: str, shape: Sequence[int], values: object) -> Tensor:
    """A tensor from JSON-like values: a flat row-major list, or lists nested exactly as `shape` says."""
    dimensions = _checked_shape(name, datatype, shape)
    if isinstance(values, TokenIds):
        values = [values]
    elif not isinstance(values, list):
        raise InvalidRequestError(f"input {shown(name)}: data must be a list, got {type(values).__name__}", name)
    if any(isinstance(part, TokenIds) for part in values):
        if datatype not in INTEGER_DATATYPES:
            raise InvalidRequestError(f"input {shown(name)}: {datatype} data must not have so many integers", name)
        return tensor_from_integers(name, datatype, dimensions, _joined_ids(name, values, dimensions))
    flat = _flatten(name, values, dimensions)
    if not _are_plainly_right(datatype, flat):
        for value in flat:
            _check_element(name, datatype, value)
    return Tensor(name, datatype, dimensions, flat)


def tensor_from_integers(name: str, datatype: str, shape: Sequence[int], array: npt.NDArray[Any]) -> Tensor:
    """A tensor of an integer datatype from all its elements in order."""
    dimensions = _checked_shape(name, datatype, shape)
    if len(array) != math.prod(dimensions):
        raise InvalidRequestError(
            f"input {shown(name)}: shape {list(dimensions)} needs {math.prod(dimensions)} elements, got {len(array)}",
            name,
        )
    for extreme in (int(array.min()), int(array.max())) if len(array) else ():
        _check_element(name, datatype, extreme)
    return Tensor(name, datatype, dimensions, array)


def tensor_from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """A tensor from its binary form."""
    dimensions = _checked_shape(name, datatype, shape)
    count = math.prod(dimensions)
    if datatype == BYTES:
        return Tensor(name, datatype, dimensions, _split_bytes(name, memoryview(raw), count))
    dtype = np.dtype(NUMPY_DTYPES[datatype])
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequestError(
            f"input {shown(name)}: shape {list(dimensions)} of {datatype} needs {count * dtype.itemsize} bytes, "
            f"got {len(raw)}",
            name,
        )
    array = np.frombuffer(raw, dtype=dtype)
    if datatype in FLOAT_DATATYPES and not np.isfinite(array).all():
        raise InvalidRequestError(f"input {shown(name)}: NaN and infinity are not allowed", name)
    return Tensor(name, datatype, dimensions, array)


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
        raise InvalidRequestError(f"input {shown(name)} is not valid UTF-8: {error}", name) from None


def _checked_shape(name: str, datatype: str, shape: Sequence[int]) -> tuple[int, ...]:
    if datatype not in DATATYPES:
        raise InvalidRequestError(
            f"input {shown(name)}: datatype must be one of {', '.join(DATATYPES)}, got {shown(datatype)}", name
        )
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(
            f"input {shown(name)}: at most {MAX_DIMENSIONS} dimensions are allowed, got {len(shape)}", name
        )
    num_elements = 1
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
            raise InvalidRequestError(
                f"input {shown(name)}: shape must hold integers from 0 to {2**31 - 1}, got {shown(size)}", name
            )
        num_elements *= size
    allowed = MAX_STRINGS if datatype == BYTES else MAX_NUMBERS
    if num_elements > allowed:
        raise InvalidRequestError(
            f"input {shown(name)}: shape {list(shape)} has {num_elements} elements; at most {allowed} of {datatype} are "
            "allowed",
            name,
        )
    return tuple(shape)


def _joined_ids(name: str, parts: list[Any], shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """The ids of `parts`, which are all there is, or the rows of `shape`."""
    arrays = []
    for part in parts:
        if isinstance(part, TokenIds):
            arrays.append(part.array)
        elif isinstance(part, list) and (not part or _are_plainly_right("INT32", part)):
            arrays.append(np.array(part, np.int32))
        else:
            raise _not_nested(name, shape)
    if len(arrays) > 1 and (len(shape) != 2 or any(len(row) != shape[1] for row in arrays)):
        raise _not_nested(name, shape)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _not_nested(name: str, shape: tuple[int, ...]) -> InvalidRequestError:
    return InvalidRequestError(f"input {shown(name)}: data is not nested as shape {list(shape)} says", name)


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
                raise _not_nested(name, shape)
    if len(flat) != math.prod(shape):
        raise InvalidRequestError(
            f"input {shown(name)}: shape {list(shape)} needs {math.prod(shape)} elements, got {len(flat)}", name
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
            raise InvalidRequestError(
                f"input {shown(name)}: a BYTES element must be a string, got {shown(value)}", name
            )
    elif datatype == BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestError(
                f"input {shown(name)}: a BOOL element must be true or false, got {shown(value)}", name
            )
    elif datatype in INTEGER_DATATYPES:
        low, high = _INTEGER_RANGES[datatype]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidRequestError(
                f"input {shown(name)}: a {datatype} element must be an integer from {low} to {high}, got {shown(value)}",
                name,
            )
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError(
            f"input {shown(name)}: a {datatype} element must be a finite number, got {shown(value)}", name
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
                f"input {shown(name)}: element {len(elements)} of the binary BYTES data ends beyond the data", name
            )
        elements.append(bytes(raw[offset + 4 : end]))
        offset = end
    if len(elements) != count:
        raise InvalidRequestError(f"input {shown(name)}: shape needs {count} BYTES elements, got {len(elements)}", name)
    return elements
