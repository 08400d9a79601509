"""What a serialized message holds, counted before protobuf makes it; its raw contents are left where they are.

Two bytes on the wire (an empty tensor, an id in typed contents) become eight to two hundred in memory, and protobuf keeps the
interpreter lock for a whole message. So the fields of a large one are counted first. Raw contents are one field whatever they
hold, and most of what is large: protobuf, which would copy them twice, does not see them. The format is that of https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from pagoda.errors import RequestTooLargeError

MAX_FIELDS = 2**14
MAX_TYPED_NUMBERS = 2**18
"""Numbers in typed contents; more of them travel as raw contents, as all clients but a person's send them."""

MIN_TEXT_BYTES = 2**16
RAW_CONTENTS = "raw_input_contents"

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_SIZES = {
    FieldDescriptor.CPPTYPE_FLOAT: 4,
    FieldDescriptor.CPPTYPE_DOUBLE: 8,
}
_NUMBERS = frozenset(
    {
        FieldDescriptor.CPPTYPE_BOOL,
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
        *_SIZES,
    }
)


@dataclass(frozen=True, slots=True)
class SplitMessage:
    """A serialized message in two: its raw contents, in order, and everything else, which is a message, too."""

    rest: bytes
    contents: list[memoryview]


def check_cost(raw: bytes | bytearray, message: Descriptor, max_characters: int | None) -> SplitMessage:
    """Raise `RequestTooLargeError` if `raw`, a serialized `message`, has too many fields or numbers, or too long a text.

    `max_characters`: what one text may have, None if that is not known. Bytes that are no message are left to protobuf.
    """
    max_text_bytes = MIN_TEXT_BYTES if max_characters is None else max(MIN_TEXT_BYTES, 4 * max_characters)
    view = memoryview(raw)
    count = _Count(max_text_bytes)
    count.add(view, message)
    contents, rest, end = [], bytearray(), 0
    for begin, start, stop in count.raw_contents:
        contents.append(view[start:stop])
        rest += view[end:begin]
        end = stop
    return SplitMessage(bytes(rest + view[end:]), contents)


class _Count:
    """`raw_contents`: where each field begins, and where its content begins and ends."""

    def __init__(self, max_text_bytes: int) -> None:
        self.raw_contents: list[tuple[int, int, int]] = []
        self._max_text_bytes = max_text_bytes
        self._num_fields = self._num_numbers = 0

    def add(self, view: memoryview, message: Descriptor | None) -> None:
        """Count the fields of a message, and of those in it; the schema has none that hold themselves."""
        place = 0
        while place < len(view):
            begin = place
            tag, place = _varint(view, place)
            wire_type = tag & 7
            self._add_fields(1)
            if wire_type == _VARINT:
                _, place = _varint(view, place)
            elif wire_type == _LENGTH:
                size, place = _varint(view, place)
                field = message.fields_by_number.get(tag >> 3) if message is not None else None
                if field is not None and field.message_type is not None:
                    self.add(view[place : place + size], field.message_type)
                elif field is not None and field.cpp_type in _NUMBERS:
                    self._add_numbers(view[place : place + size], field)
                elif field is None or field.name != RAW_CONTENTS:
                    self._check_text(size)
                elif place + size <= len(view):
                    self.raw_contents.append((begin, place, place + size))
                place += size
            else:
                place += _FIXED_SIZES.get(wire_type, 0)

    def _add_fields(self, count: int) -> None:
        self._num_fields += count
        if self._num_fields > MAX_FIELDS:
            raise RequestTooLargeError(
                f"the message has more than {MAX_FIELDS} fields: tensors, parameters, elements of bytes_contents; send many "
                "elements in raw_input_contents"
            )

    def _check_text(self, size: int) -> None:
        if size > self._max_text_bytes:
            raise RequestTooLargeError(
                f"the message has a text of {size} bytes; at most {self._max_text_bytes} are allowed for this model's context"
            )

    def _add_numbers(self, packed: memoryview, field: FieldDescriptor) -> None:
        size = _SIZES.get(field.cpp_type)
        if size is None:
            self._num_numbers += int(np.count_nonzero(np.frombuffer(packed, np.uint8) < 0x80))
        else:
            self._num_numbers += len(packed) // size
        if self._num_numbers > MAX_TYPED_NUMBERS:
            raise RequestTooLargeError(
                f"the message has more than {MAX_TYPED_NUMBERS} numbers in contents; send them in raw_input_contents"
            )


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    """The number at `place`, and where it ends; one that is cut short ends with the bytes."""
    number = shift = 0
    while place < len(view) and shift < 70:
        byte = view[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return number, place
