"""The bytes between client and core: length-prefixed frames of msgspec, over a socket pair that only the two hold.

    frame = uint32 length of what follows | uint8 kind | MessagePack of the message's dataclass

The kind says which class to decode into, so nothing is ever guessed from content, and nothing is pickled.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from pagoda.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutputs,
    EngineReady,
    EngineRequest,
    EngineStage,
    Shutdown,
    StartCore,
)

Message = (
    StartCore | EngineRequest | AbortRequests | Shutdown | EngineStage | EngineReady | EngineOutputs | EngineFailed
)

_KINDS: tuple[type[Any], ...] = (
    StartCore,
    EngineRequest,
    AbortRequests,
    Shutdown,
    EngineStage,
    EngineReady,
    EngineOutputs,
    EngineFailed,
)
_KIND_OF = {cls: kind for kind, cls in enumerate(_KINDS)}
_DECODERS = [msgspec.msgpack.Decoder(cls) for cls in _KINDS]
_ENCODER = msgspec.msgpack.Encoder()

HEADER = struct.Struct("<IB")


class UnreadableRequestError(Exception):
    """A frame that should be a request and is not one; `request_id` is whose it is, where that much can be read."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


def encode(message: Message) -> bytes:
    """The frame of a message."""
    payload = _ENCODER.encode(message)
    return HEADER.pack(len(payload) + 1, _KIND_OF[type(message)]) + payload


def payload_size(header: bytes) -> int:
    """Bytes that follow a header."""
    size: int = HEADER.unpack(header)[0]
    return size - 1


def decode(header: bytes, payload: bytes) -> Message:
    """The message of a frame. Raises `UnreadableRequestError`, and `msgspec.ValidationError` for other kinds of message."""
    kind: int = HEADER.unpack(header)[1]
    try:
        message: Message = _DECODERS[kind].decode(payload)
    except msgspec.ValidationError as error:
        if _KINDS[kind] is not EngineRequest:
            raise
        raise UnreadableRequestError(str(msgspec.msgpack.decode(payload).get("request_id")), str(error)) from error
    return message
