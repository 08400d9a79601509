"""The driver's side of all ranks: one channel each, one inbox for all of them, one place where a failure is noticed.

    reader threads ──inbox──▶ the driver's thread: `receive`, `collect`      heartbeat thread ──▶ ranks

Everything but the reading of bytes happens in the driver's thread, so nothing here needs a lock.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pagoda.distributed.rank_channel import CODEC, ChannelEnded, HeartbeatThread, RankChannel
from pagoda.distributed.rank_launcher import RankConnection
from pagoda.distributed.rank_messages import Command, EndRank, Heartbeat, Message, RankFailed, RankHello
from pagoda.errors import EngineDeadError, PagodaError, error_of
from pagoda.parallel.rank_health import RankHealth
from pagoda.timers import HeartbeatTimer

CHECK_SECONDS = 0.25
START_SLACK = 3.0
# When a rank dies, others fail because they cannot reach it, and their errors may arrive before its disconnect.
CAUSE_SECONDS = 1.0

Answer = TypeVar("Answer")


class RankLinks:
    """`death_of(rank)`: how a rank's process ended, where its launcher knows."""

    def __init__(
        self,
        connections: Sequence[RankConnection],
        death_of: Callable[[int], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts = [connection.host for connection in connections]
        self._pids = [0] * len(connections)
        self._death_of = death_of
        self._clock = clock
        self._inbox: queue.SimpleQueue[tuple[int, Message | ChannelEnded]] = queue.SimpleQueue()
        self._channels = [RankChannel(connection.socket) for connection in connections]
        self._timers: list[HeartbeatTimer] = []
        self._last_check = 0.0
        self._heartbeat_timeout = 0.0
        self._bound = 0.0
        self._heartbeats: HeartbeatThread | None = None
        for rank, channel in enumerate(self._channels):
            channel.start(partial(self._put, rank))

    def name(self, rank: int) -> str:
        """A rank for people: `rank 1 of 2 (host node-b, pid 4711)`."""
        pid = f", pid {self._pids[rank]}" if self._pids[rank] else ""
        return f"rank {rank} of {len(self._channels)} (host {self._hosts[rank]}{pid})"

    def note_hello(self, rank: int, hello: RankHello) -> None:
        """Note a rank's host and process, from its hello."""
        self._hosts[rank], self._pids[rank] = hello.host, hello.pid

    def watch(self, heartbeat_timeout: float) -> None:
        """From here on heartbeats go both ways, and a rank without one for `heartbeat_timeout` seconds has failed.

        Before `settle` three times as long: libraries that are loaded and kernels that are compiled keep the interpreter to
        themselves.
        """
        self._heartbeat_timeout = heartbeat_timeout
        self._bound = START_SLACK * heartbeat_timeout
        self._timers = [HeartbeatTimer() for _ in self._channels]
        self._heartbeats = HeartbeatThread(self._channels, Heartbeat, heartbeat_timeout)
        self._heartbeats.start()

    def settle(self) -> None:
        """The start-up is over."""
        self._bound = self._heartbeat_timeout

    def health(self) -> list[RankHealth]:
        """All ranks as of now."""
        return [
            RankHealth(
                rank=rank,
                host=self._hosts[rank],
                pid=self._pids[rank],
                last_heartbeat=channel.last_received,
                num_steps=channel.heartbeat.num_steps,
            )
            for rank, channel in enumerate(self._channels)
        ]

    def furthest_behind(self) -> list[int]:
        """The ranks that have done least by their last heartbeat; all of them when they are level."""
        done = [(channel.heartbeat.num_steps, channel.heartbeat.num_operations) for channel in self._channels]
        return [rank for rank, own in enumerate(done) if own == min(done)]

    def _put(self, rank: int, message: Message | ChannelEnded) -> None:
        """Called from a reader thread."""
        self._inbox.put((rank, message))

    # ---- messages -------------------------------------------------------------------------------------------------

    def send_each(self, commands: Sequence[Command]) -> None:
        """Send each rank its own command."""
        for channel, command in zip(self._channels, commands, strict=True):
            channel.send(command)

    def send_all(self, command: Command) -> None:
        """Send one command, encoded once, to all ranks."""
        frame = CODEC.encode(command)
        for channel in self._channels:
            channel.send_frame(frame)

    def receive(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its rank, None after `timeout` seconds (0: do not wait).

        Raises `EngineDeadError` when a rank has failed, and the error that a rank reports of itself.
        """
        try:
            rank, message = self._inbox.get(timeout > 0, timeout or None)
        except queue.Empty:
            self._check_heartbeats()
            return None
        if isinstance(message, ChannelEnded | RankFailed):
            raise self._cause(rank, message)
        self._check_heartbeats()
        return rank, message

    def collect(
        self,
        answer: type[Answer],
        *,
        deadline: float,
        otherwise: str,
        on_other: Callable[[int, Message], None] | None = None,
    ) -> list[Answer]:
        """One `answer` of each rank, in their order; `on_other` is called for messages of another kind.

        Raises what `receive` does, and `EngineDeadError` after `deadline` (seconds of the clock), with the names of those that
        did not answer and what `otherwise` says.
        """
        answers: dict[int, Answer] = {}
        while len(answers) < len(self._channels):
            left = deadline - self._clock()
            received = self.receive(min(CHECK_SECONDS, max(0.0, left)))  # late or not: what has arrived counts
            if received is not None:
                rank, message = received
                if isinstance(message, answer):
                    answers[rank] = message
                elif on_other is not None:
                    on_other(rank, message)
                else:
                    raise EngineDeadError(f"{self.name(rank)} sent an unexpected {type(message).__name__}")
            elif left <= 0:
                missing = [self.name(rank) for rank in range(len(self._channels)) if rank not in answers]
                raise EngineDeadError(f"{', '.join(missing)} {otherwise}")
        return [answers[rank] for rank in range(len(self._channels))]

    def end(self, reason: str) -> None:
        """Tell the ranks to end."""
        if self._heartbeats is not None:
            self._heartbeats.stop()
        for channel in self._channels:
            channel.send(EndRank(reason))

    def close(self) -> None:
        """Close all channels; a rank that is still there ends with its own."""
        for channel in self._channels:
            channel.close()

    # ---- failures -------------------------------------------------------------------------------------------------

    def _check_heartbeats(self) -> None:
        """Raise `EngineDeadError` for a rank whose heartbeat is overdue."""
        now = self._clock()
        if now - self._last_check < CHECK_SECONDS:
            return
        self._last_check = now
        for rank, timer in enumerate(self._timers):
            silent = timer.check(self._channels[rank].last_received, now)
            if silent > self._bound:
                raise EngineDeadError(
                    f"no heartbeat from {self.name(rank)} for {silent:.1f} s (timeout {self._bound:g} s by "
                    "rank_heartbeat_timeout_seconds): its process is stopped, or the network to its host is cut"
                )

    def _cause(self, rank: int, cause: ChannelEnded | RankFailed) -> PagodaError:
        """The error for a rank's end. When it only could not reach others, these get time to report the root cause."""
        until = self._clock() + CAUSE_SECONDS
        while isinstance(cause, RankFailed) and cause.is_communication and (left := until - self._clock()) > 0:
            try:
                other, message = self._inbox.get(timeout=min(CHECK_SECONDS, left))
            except queue.Empty:
                continue
            if isinstance(message, ChannelEnded) and other == rank:
                continue  # it has reported that already
            if isinstance(message, ChannelEnded | RankFailed):
                rank, cause = other, message
        if isinstance(cause, RankFailed):
            return error_of(cause.kind, f"{self.name(rank)}: {cause.message}")
        death = self._death_of(rank)
        return EngineDeadError(
            f"{self.name(rank)} {death}" if death else f"{self.name(rank)} disconnected: {cause.reason}"
        )
