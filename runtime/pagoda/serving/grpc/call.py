"""One call: its metadata and deadline, the messages that come, and the response (gRPC over HTTP/2).

    HEADERS ──▶ Call ──▶ handler          a message:  ┌─flag─┬── size ──┬── content ──┐
    DATA ─────▶ read_prefix, read_content             │  0   │ 00000c80 │ ………………      │
    DATA ◀───── write                                 └──────┴──────────┴─────────────┘
    HEADERS ◀── finish: grpc-status

Until a message is asked for, the client may send `WINDOW_BYTES` of it. Its size is known then, before the rest is let in, and
what is let in goes straight into the message.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from typing import Protocol

import grpc

from pagoda.errors import InvalidRequestError
from pagoda.serving.tracing.seam import NO_SPAN

WINDOW_BYTES = 2**16 - 1
"""HTTP/2's own; a client may send before it has seen another."""
READ_WINDOW_BYTES = 2**20
"""Of a message that is being received."""
PREFIX = struct.Struct(">?I")


class CallError(Exception):
    """Ends a call with a status other than OK. `trailers`: further metadata."""

    def __init__(self, code: grpc.StatusCode, message: str, trailers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.trailers = trailers


class Channel(Protocol):
    """What a call asks of its connection."""

    def grant(self, stream_id: int, num_bytes: int) -> None:
        """Let the client send so many bytes more of a stream."""

    def try_send(self, call: Call, data: bytes) -> bool:
        """Send `data` if that takes no wait; False where it was not sent."""

    async def send(self, call: Call, data: bytes) -> None:
        """Send `data` as fast as the client takes it."""

    def works(self, call: Call) -> None:
        """The call was admitted: its connection is not idle."""


class Call:
    """A call whose head has arrived. `deadline`: the event loop's time, None without one.

    Its task is cancelled when the client has left or the deadline is over.
    """

    def __init__(
        self,
        channel: Channel,
        stream_id: int,
        path: str,
        metadata: Mapping[str, str],
        address: str,
        deadline: float | None,
    ) -> None:
        self.stream_id = stream_id
        self.path = path
        self.metadata = metadata
        self.address = address
        self.code = grpc.StatusCode.OK
        self.has_head = False
        self.has_status = False
        self.is_received = False
        """Whether the client has ended its side."""
        self.is_working = False
        self.span = NO_SPAN
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.may_send: asyncio.Future[None] | None = None  # while the client's window is full
        self._channel = channel
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._unread = bytearray()
        self._content: bytearray | None = None  # of the message that is being received
        self._num_filled = 0
        self._window = WINDOW_BYTES  # what the client may send
        self._arrival: asyncio.Future[None] | None = None

    def time_remaining(self) -> float | None:
        """For how many seconds the client waits, None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._loop.time())

    def works(self) -> None:
        """The caller may do what it asks for: from now on its connection is not closed for another."""
        if not self.is_working:
            self._channel.works(self)

    # ---- what the client sends

    async def read_prefix(self) -> tuple[bool, int] | None:
        """Whether the next message is compressed, and its size; None after the last one."""
        unread = self._unread
        while len(unread) < PREFIX.size:
            if self.is_received:
                if unread:
                    raise _cut_short()
                return None
            await self._arrived()
        is_compressed, size = PREFIX.unpack_from(unread)
        del unread[: PREFIX.size]
        return is_compressed, size

    async def read_content(self, size: int) -> bytes | bytearray:
        """The message of the prefix that was read."""
        unread = self._unread
        if len(unread) >= size:
            content = bytes(unread[:size])
            del unread[:size]
            self._grant(WINDOW_BYTES - len(unread))
            return content
        whole = self._content = bytearray(size)
        self._num_filled = len(unread)
        whole[: len(unread)] = unread
        unread.clear()
        try:
            while self._num_filled < size:
                if self.is_received:
                    raise _cut_short()
                self._grant(max(WINDOW_BYTES, min(size - self._num_filled, READ_WINDOW_BYTES)))
                await self._arrived()
        finally:
            self._content = None
        self._grant(WINDOW_BYTES - len(unread))
        return whole

    def feed(self, data: bytes, num_flow_bytes: int) -> None:
        """A piece of the request; `num_flow_bytes`: of the window, with padding."""
        self._window -= num_flow_bytes
        if self.has_status:
            return
        content = self._content
        if content is not None:
            start = self._num_filled
            end = min(start + len(data), len(content))
            content[start:end] = data[: end - start] if end - start < len(data) else data
            self._num_filled = end
            if end < len(content):
                self._grant(max(WINDOW_BYTES, min(len(content) - end, READ_WINDOW_BYTES)))
                return
            data = data[end - start :]
        if data:
            self._unread += data
        if num_flow_bytes > len(data) and len(self._unread) < PREFIX.size:
            self._grant(WINDOW_BYTES - len(self._unread))  # padding
        self._wake()

    def end_input(self) -> None:
        """The client has ended its side."""
        self.is_received = True
        self._wake()

    def _grant(self, wanted: int) -> None:
        """Let the client send `wanted` bytes, if that is much more than it may now."""
        if wanted > self._window and wanted >= 2 * self._window and not self.is_received:
            self._channel.grant(self.stream_id, wanted - self._window)
            self._window = wanted

    async def _arrived(self) -> None:
        self._arrival = self._loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # ---- what the server sends

    async def write(self, message: bytes) -> None:
        """Send a message, after those before it."""
        data = PREFIX.pack(False, len(message)) + message
        if not self._channel.try_send(self, data):
            await self._channel.send(self, data)


def _cut_short() -> InvalidRequestError:
    return InvalidRequestError("the message is cut short: the client has ended the call")
