"""The messages between client and core as frames (see `pagoda.framing`), over a socket pair that only the two hold."""

from __future__ import annotations

import msgspec

from pagoda.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutputs,
    EngineRanks,
    EngineReady,
    EngineStage,
    Shutdown,
    StartCore,
)
from pagoda.framing import HEADER, FrameCodec, FrameError
from pagoda.request import EngineRequest

Message = (
    StartCore
    | EngineRequest
    | AbortRequests
    | Shutdown
    | EngineStage
    | EngineReady
    | EngineOutputs
    | EngineRanks
    | EngineFailed
)

_CODEC = FrameCodec(
    (
        StartCore,
        EngineRequest,
        AbortRequests,
        Shutdown,
        EngineStage,
        EngineReady,
        EngineOutputs,
        EngineRanks,
        EngineFailed,
    )
)

__all__ = ["HEADER", "FrameError", "Message", "UnreadableRequestError", "decode", "encode", "payload_size"]


class UnreadableRequestError(Exception):
    """A frame that should be a request and is not one; `request_id` is whose it is, where that much can be read."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return _CODEC.encode(message)


def payload_size(header: bytes) -> int:
    """Bytes that follow a header. Raises `FrameError`."""
    return _CODEC.payload_size(header)


def decode(header: bytes, payload: bytes) -> Message:
    """The message of a frame. Raises `UnreadableRequestError`, and `FrameError` for other kinds of message."""
    try:
        message: Message = _CODEC.decode(header, payload)
    except FrameError as error:
        if _CODEC.kind_of(header) is not EngineRequest or not isinstance(error.__cause__, msgspec.ValidationError):
            raise
        raise UnreadableRequestError(str(msgspec.msgpack.decode(payload).get("request_id")), str(error)) from error
    return message
