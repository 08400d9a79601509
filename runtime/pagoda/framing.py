"""Frames on a stream socket between processes of one server: typed messages, nothing pickled.

    frame = uint32 length of what follows | uint8 kind | MessagePack of the message's dataclass

The kind is the index of the class in a fixed list.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from pagoda.errors import PagodaError

HEADER = struct.Struct("<IB")
MAX_PAYLOAD_BYTES = 2**30


class FrameError(Exception):
    """An invalid frame: of an unknown kind, too long, or with a payload that does not match its kind."""


class FrameCodec:
    """Encodes and decodes messages of the classes in `kinds`; a class's place in it is its kind on the wire."""

    def __init__(self, kinds: Sequence[type[Any]]) -> None:
        self.kinds = tuple(kinds)
        self._kind_of = {cls: kind for kind, cls in enumerate(kinds)}
        self._decoders = [msgspec.msgpack.Decoder(cls) for cls in kinds]
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Any) -> bytes:
        """The frame of a message. Raises `KeyError` for one of a class that is not in the list."""
        payload = self._encoder.encode(message)
        return HEADER.pack(len(payload) + 1, self._kind_of[type(message)]) + payload

    def payload_size(self, header: bytes) -> int:
        """Bytes that follow a header. Raises `FrameError`."""
        length, kind = HEADER.unpack(header)
        if not 1 <= length <= MAX_PAYLOAD_BYTES or kind >= len(self.kinds):
            raise FrameError(
                f"invalid frame header: kind {kind} (0 to {len(self.kinds) - 1}), length {length} (1 to {MAX_PAYLOAD_BYTES})"
            )
        return int(length) - 1

    def kind_of(self, header: bytes) -> type[Any]:
        """The class of a frame's message, by a header that `payload_size` has accepted."""
        kind: int = HEADER.unpack(header)[1]
        return self.kinds[kind]

    def decode(self, header: bytes, payload: bytes) -> Any:
        """The message of a frame whose header `payload_size` has accepted. Raises `FrameError` from the reason."""
        kind = HEADER.unpack(header)[1]
        try:
            return self._decoders[kind].decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, PagodaError) as error:
            # Text that is no UTF-8, and values that a class refuses (`SamplingParams`), come as errors of their own.
            raise FrameError(f"invalid {self.kinds[kind].__name__} message: {error}") from error
