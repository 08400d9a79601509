"""Receives the messages of calls, once it is known who calls.

Of a message that nobody has asked for, `WINDOW_BYTES` arrive at most. Its size is checked before more of it is let in: against
what a message may have, and what is being received already. A method that needs no key needs a message all the same: a small
one, which comes with its head. Where more than a few hundred of them do not, the call that has waited longest makes room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from pagoda.config.schema import PagodaConfig
from pagoda.config.sizes import exact_bytes
from pagoda.errors import DeadlineExceededError, InvalidRequestError, QueueFullError, RequestTooLargeError
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.grpc.call import Call, CallError
from pagoda.serving.http.bodies import decompress
from pagoda.serving.json_decoding import LARGE_BYTES
from pagoda.serving.request_memory import Reservation

SLOWEST_MESSAGE_BYTES_PER_SECOND = 64 * 1024
MAX_UNKNOWN_MESSAGE_BYTES = 16 * 1024
"""Without an API key: the name of a model or a service."""
MAX_UNKNOWN_WAITING = 256
"""Calls without an API key whose message has not come. Each may hold a window."""
UNKNOWN_MESSAGE_SECONDS = 5.0
ENCODINGS = frozenset({"gzip", "deflate"})


class Received:
    """A message as bytes, and the room that it takes until `release`."""

    __slots__ = ("_reservation", "content")

    def __init__(self, content: bytes | bytearray, reservation: Reservation | None = None) -> None:
        self.content = content
        self._reservation = reservation

    def release(self) -> None:
        """The message was decoded, or will not be; may be called twice."""
        self.content = b""
        if self._reservation is not None:
            self._reservation.release()


class MessageReader:
    """The messages of all calls of a server."""

    def __init__(self, config: PagodaConfig, decoding: DecodingThreads) -> None:
        self._longest = config.max_grpc_message_bytes
        self._seconds = config.body_timeout_seconds + self._longest / SLOWEST_MESSAGE_BYTES_PER_SECOND
        self._decoding = decoding
        self._waiting: dict[Call, asyncio.Timeout] = {}  # of calls without a key, in the order of their arrival

    async def read(self, call: Call, longest: int | None = None) -> Received | None:
        """The message of a call whose caller may do more than what is public; None for a call without one.

        `longest`: bytes that a message of its method may have, None for as many as any.

        Raises `DeadlineExceededError` where it does not arrive in time, `RequestTooLargeError` for one that is too large,
        `QueueFullError` where too much is being received.
        """
        async with self._in_time(self._seconds):
            prefix = await call.read_prefix()
            return None if prefix is None else await self._content(call, *prefix, longest or self._longest)

    async def read_next(self, call: Call) -> Received | None:
        """The next message of a stream, None at its end. It may begin when it likes; raises what `read` does."""
        prefix = await call.read_prefix()
        if prefix is None:
            return None
        async with self._in_time(self._seconds):
            return await self._content(call, *prefix, self._longest)

    async def read_unknown(self, call: Call) -> Received | None:
        """The next message of a caller without a key, None after the last one.

        Raises `DeadlineExceededError` where it does not arrive soon, `QueueFullError` where many others wait,
        `RequestTooLargeError` for what no probe sends.
        """
        if len(self._waiting) >= MAX_UNKNOWN_WAITING:
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest).reschedule(0)
        try:
            async with asyncio.timeout(UNKNOWN_MESSAGE_SECONDS) as deadline:
                self._waiting[call] = deadline
                prefix = await call.read_prefix()
                if prefix is None:
                    return None
                is_compressed, size = prefix
                if size > MAX_UNKNOWN_MESSAGE_BYTES or is_compressed:
                    raise RequestTooLargeError(
                        f"without an API key a message may have {exact_bytes(MAX_UNKNOWN_MESSAGE_BYTES)}, uncompressed"
                    )
                return Received(await call.read_content(size))
        except TimeoutError:
            if call not in self._waiting:
                raise QueueFullError("the message did not come, and others without an API key wait") from None
            raise DeadlineExceededError(f"the message did not arrive within {UNKNOWN_MESSAGE_SECONDS:g} s") from None
        finally:
            self._waiting.pop(call, None)

    async def _content(self, call: Call, is_compressed: bool, size: int, longest: int) -> Received:
        if size > longest:
            raise self._too_large(f"has {exact_bytes(size)}", longest)
        encoding = call.metadata.get("grpc-encoding", "identity") if is_compressed else ""
        if encoding and encoding not in ENCODINGS:
            if encoding == "identity":
                raise InvalidRequestError("the message is marked as compressed, and grpc-encoding is identity")
            raise CallError(
                grpc.StatusCode.UNIMPLEMENTED, f"grpc-encoding must be gzip, deflate or identity, got {encoding[:40]!r}"
            )
        reservation = self._decoding.memory.reserve(size)
        try:
            content = await call.read_content(size)
            if encoding:
                compressed, too_large = content, self._too_large("becomes larger when it is decompressed", longest)
                # A small message may decompress to a large one.
                content = await self._decoding.run(LARGE_BYTES + 1, lambda: decompress(compressed, longest, too_large))
                reservation.grow(max(0, len(content) - size))
        except BaseException:  # raised on: nobody else gives its memory back
            reservation.release()
            raise
        return Received(content, reservation)

    def _too_large(self, what: str, longest: int) -> RequestTooLargeError:
        why = "max_grpc_message_bytes" if longest == self._longest else "of a method without tensors"
        return RequestTooLargeError(f"the message {what}; {exact_bytes(longest)} are allowed ({why})")

    @asynccontextmanager
    async def _in_time(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise DeadlineExceededError(f"the message did not arrive within {seconds:g} s") from None
