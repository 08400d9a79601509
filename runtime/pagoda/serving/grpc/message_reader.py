"""Receives the messages of calls, once it is known who calls.

grpc receives no message before a handler asks for it; until then a stream holds what fits its flow-control window, 64 KiB. A
handler of a method with a single message is called only when that has arrived, so every method is registered as one that takes
a stream, and asks here.

A method that needs no key needs a message all the same. Callers without a key share few places to send one. While others
wait, a place is for a moment only, for a probe's message comes with its head; and peers take turns, so that none keeps out the
probes of another.
"""

from __future__ import annotations

import asyncio
from collections import deque

import grpc

from pagoda.config.schema import PagodaConfig
from pagoda.errors import DeadlineExceededError, QueueFullError, RequestTooLargeError

SLOWEST_MESSAGE_BYTES_PER_SECOND = 64 * 1024
UNKNOWN_CALLERS_BYTES = 32 * 2**20
"""What the messages of all callers without a key may take together while they are received."""
MAX_UNKNOWN_MESSAGE_BYTES = 64 * 1024
UNKNOWN_MESSAGE_SECONDS = 5.0
TURN_SECONDS = 0.02
MAX_WAITING_PER_PEER = 64


class MessageReader:
    """The messages of all calls of a server, as bytes."""

    def __init__(self, config: PagodaConfig) -> None:
        longest = config.max_grpc_message_bytes
        self._seconds = config.body_timeout_seconds + longest / SLOWEST_MESSAGE_BYTES_PER_SECOND
        self._places = _Places(max(1, UNKNOWN_CALLERS_BYTES // longest))

    async def read(self, call: grpc.aio.ServicerContext, *, is_known: bool) -> bytes | None:
        """The next message of `call`, None after the last one. `is_known`: whether the caller may do more than what is public.

        Raises `DeadlineExceededError` where it does not arrive in time. For a caller without a key: `QueueFullError` where
        others want the place, `RequestTooLargeError` for what no probe sends.
        """
        if is_known:
            return await _read(call, self._seconds)
        await self._places.take(call.peer().rpartition(":")[0])
        reading = asyncio.ensure_future(_read(call, UNKNOWN_MESSAGE_SECONDS))
        self._places.use(reading)
        try:
            await asyncio.wait((reading,))
            if reading.cancelled():
                raise QueueFullError(
                    "the message did not come with the call's head, and others without an API key wait"
                )
            message = reading.result()
        finally:
            reading.cancel()
            self._places.release(reading)
        if message is not None and len(message) > MAX_UNKNOWN_MESSAGE_BYTES:
            raise RequestTooLargeError(f"without an API key a message may have {MAX_UNKNOWN_MESSAGE_BYTES} bytes")
        return message


class _Places:
    """Places of which each is used by one `reading` at a time, and given to peers in turn."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._used: dict[asyncio.Future[bytes | None], float] = {}  # since when
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by peer, in the order of their turns
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, peer: str) -> None:
        """Wait for a place; `use` or `release` must follow."""
        if self._num_free:
            self._num_free -= 1
            return
        turns = self._waiting.setdefault(peer, deque())
        if len(turns) >= MAX_WAITING_PER_PEER:
            raise QueueFullError(f"{len(turns)} calls without an API key wait already")
        turn = asyncio.get_running_loop().create_future()
        turns.append(turn)
        self._arm()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give()  # it was ours already
            raise

    def use(self, reading: asyncio.Future[bytes | None]) -> None:
        """The place is used by `reading`, which is cancelled where others have waited for long enough."""
        self._used[reading] = asyncio.get_running_loop().time()
        self._arm()

    def release(self, reading: asyncio.Future[bytes | None]) -> None:
        """Give the place to who waits."""
        del self._used[reading]
        self._give()

    def _give(self) -> None:
        while self._waiting:
            peer, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            del self._waiting[peer]
            if turns:
                self._waiting[peer] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1

    def _arm(self) -> None:
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TURN_SECONDS, self._end_turns)

    def _end_turns(self) -> None:
        self._timer = None
        before = asyncio.get_running_loop().time() - TURN_SECONDS
        for reading, since in self._used.items():
            if since <= before:
                reading.cancel()
        self._arm()


async def _read(call: grpc.aio.ServicerContext, seconds: float) -> bytes | None:
    try:
        async with asyncio.timeout(seconds):
            message = await call.read()
    except TimeoutError:
        raise DeadlineExceededError(f"the message did not arrive within {seconds:g} s") from None
    return None if message is grpc.aio.EOF else message
