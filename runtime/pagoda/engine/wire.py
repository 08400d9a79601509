"""The messages between client and core as frames (see `pagoda.framing`), over a private socket pair."""

from __future__ import annotations

import msgspec

from pagoda.engine.messages import (
    AbortRequests,
    AdapterLoaded,
    EngineFailed,
    EngineOutputs,
    EngineRanks,
    EngineReady,
    EngineStartupPhase,
    EngineTrace,
    LoadAdapter,
    Reconfigure,
    Reconfigured,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    SleepState,
    StartCore,
    TraceSteps,
    UnloadAdapter,
    WakeUp,
)
from pagoda.errors import PagodaError, RequestFailedError
from pagoda.framing import HEADER, FrameCodec, FrameError
from pagoda.request import EngineRequest

Message = (
    StartCore
    | EngineRequest
    | AbortRequests
    | ResetPrefixCache
    | TraceSteps
    | LoadAdapter
    | UnloadAdapter
    | Shutdown
    | EngineStartupPhase
    | EngineReady
    | EngineOutputs
    | EngineRanks
    | AdapterLoaded
    | EngineFailed
    | Sleep
    | WakeUp
    | SleepState
    | Reconfigure
    | Reconfigured
    | EngineTrace
)

_CODEC = FrameCodec(
    (
        StartCore,
        EngineRequest,
        AbortRequests,
        Shutdown,
        EngineStartupPhase,
        EngineReady,
        EngineOutputs,
        EngineRanks,
        EngineFailed,
        ResetPrefixCache,
        Sleep,
        WakeUp,
        SleepState,
        Reconfigure,
        Reconfigured,
        TraceSteps,
        EngineTrace,
        LoadAdapter,
        UnloadAdapter,
        AdapterLoaded,
    )
)

__all__ = ["HEADER", "FrameError", "Message", "UnreadableRequestError", "decode", "encode", "payload_size"]


class UnreadableRequestError(Exception):
    """A frame that should be the request `request_id` and is not; `reason` is what that request ends with."""

    def __init__(self, request_id: str, reason: PagodaError) -> None:
        super().__init__(str(reason))
        self.request_id = request_id
        self.reason = reason


def encode(message: Message) -> bytes:
    """The frame of a message, header and payload."""
    return _CODEC.encode(message)


def payload_size(header: bytes) -> int:
    """Bytes that follow a header. Raises `FrameError`."""
    return _CODEC.payload_size(header)


def decode(header: bytes, payload: bytes) -> Message:
    """The message of a frame.

    Raises `UnreadableRequestError` for a request that is wrong in its types or refused for its values, which concerns that
    request only, and `FrameError` for one whose id cannot be read and for other kinds of message.
    """
    try:
        message: Message = _CODEC.decode(header, payload)
    except FrameError as error:
        request_id = _request_id(payload) if _CODEC.kind_of(header) is EngineRequest else None
        if request_id is None:
            raise
        cause = error.__cause__
        reason = (
            cause if isinstance(cause, PagodaError) else RequestFailedError(f"the request could not be read: {error}")
        )
        raise UnreadableRequestError(request_id, reason) from error
    return message


def _request_id(payload: bytes) -> str | None:
    """The id of a request that cannot be read otherwise."""
    try:
        fields = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    request_id = fields.get("request_id") if isinstance(fields, dict) else None
    return request_id if isinstance(request_id, str) else None
