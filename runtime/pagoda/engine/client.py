"""The engine as the server sees it: requests in, streams of outputs out, one health.

`EngineClient` is the seam; `ProcessEngineClient` runs the core in a process of its own. They talk over a socket pair that the
child inherits: nobody else can connect to it, and when either side dies the other reads its end at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict

from pagoda.config.schema import PagodaConfig
from pagoda.engine import wire
from pagoda.engine.health import EngineHealth, EngineState
from pagoda.engine.mailbox import Mailbox
from pagoda.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    EngineReady,
    EngineRequest,
    EngineStage,
    EngineStats,
    Shutdown,
    StartCore,
)
from pagoda.engine.progress_board import EngineProgress, ProgressBoard
from pagoda.engine.service_rate import ServiceRate
from pagoda.errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    PagodaError,
    QueueFullError,
    error_of,
)

logger = logging.getLogger(__name__)

_KILL_AFTER_SECONDS = 5.0


class EngineClient(ABC):
    """An engine that takes requests. Used from one event loop.

    `ready` holds the engine's limits once it has started, `stats` its figures after the last step.
    """

    def __init__(self) -> None:
        self.health = EngineHealth()
        self.ready: EngineReady | None = None
        self.stats = EngineStats()

    @abstractmethod
    async def start(self) -> None:
        """Bring the engine up; returns when it is ready. Raises the reason (a `PagodaError`) when it cannot be."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Run a request; its outputs as they come, the last one with a `finish_reason`.

        Raises `EngineNotReadyError`, `EngineDeadError`, `QueueFullError` or `InvalidRequestError` in place of the first
        output, and `EngineDeadError` later if the engine is lost. Closing the iterator aborts the request in the engine.
        """

    @abstractmethod
    async def shutdown(self) -> None:
        """End the engine; what still runs gets `EngineDeadError`."""


class ProcessEngineClient(EngineClient):
    """The core in a child process, reached over an inherited socket pair."""

    def __init__(self, config: PagodaConfig) -> None:
        super().__init__()
        self._config = config
        self._mailboxes: dict[str, Mailbox] = {}
        self._service_rate = ServiceRate()
        self._child: subprocess.Popen[bytes] | None = None
        self._board: ProgressBoard | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineReady] | None = None
        self._is_ending = False

    @property
    def pid(self) -> int | None:
        """Process id of the core, once it was started."""
        return None if self._child is None else self._child.pid

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._mailboxes)

    @property
    def progress(self) -> EngineProgress:
        """The core's last sign of life, read from shared memory."""
        assert self._board is not None, "the engine was not started"
        return self._board.read()

    async def start(self) -> None:
        """Start the core's process and wait until it is ready; see `EngineClient.start`."""
        ours, theirs = socket.socketpair()
        self._board = ProgressBoard()
        self._started = asyncio.get_running_loop().create_future()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pagoda.engine.process", str(theirs.fileno()), str(self._board.fd)],
                pass_fds=(theirs.fileno(), self._board.fd),
                stdin=subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._send(StartCore(_core_fields(self._config)))
        self._reading = asyncio.create_task(self._read(reader), name="engine-reader")
        try:
            async with asyncio.timeout(self._config.engine_start_timeout_seconds):
                self.ready = await self._started
        except TimeoutError:
            message = (
                f"the engine was not ready after engine_start_timeout_seconds="
                f"{self._config.engine_start_timeout_seconds:g} (stage: {self.health.stage})"
            )
            self.health.transition(EngineState.DEAD, message)
            await self.shutdown()
            raise EngineDeadError(message) from None
        self.health.transition(EngineState.READY, "started")

    async def submit(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `EngineClient.submit`."""
        self._admit(request)
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        self._send(request)
        is_over = False
        try:
            while not is_over:
                output = await mailbox.get()
                is_over = output.finish_reason is not None
                if output.error_kind is not None:
                    raise error_of(output.error_kind, output.error or "the request failed")
                yield output
        except EngineDeadError:
            is_over = True
            raise
        finally:
            # The one place where a request leaves: ended, failed, closed by its reader or cancelled.
            del self._mailboxes[request.request_id]
            if not is_over:
                self._send(AbortRequests([request.request_id]))

    def _admit(self, request: EngineRequest) -> None:
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        if not self.health.accepts_requests or self.ready is None:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.stage})")
        if request.request_id in self._mailboxes:
            raise InvalidRequestError(f"a request with id {request.request_id!r} is running already", "request_id")
        limit = self.ready.max_num_seqs + self._config.max_num_waiting
        if len(self._mailboxes) >= limit:
            waiting = len(self._mailboxes) - self.ready.max_num_seqs
            raise QueueFullError(
                f"{waiting} requests are waiting, as many as max_num_waiting allows",
                self._service_rate.seconds_until_served(waiting),
            )

    def _send(self, message: wire.Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Deliver what the core says until it ends; then everybody who waits hears why."""
        cause: PagodaError | None = None
        try:
            while True:
                header = await reader.readexactly(wire.HEADER.size)
                message = wire.decode(header, await reader.readexactly(wire.payload_size(header)))
                if isinstance(message, EngineOutputs):
                    self._deliver(message)
                elif isinstance(message, EngineStage):
                    self.health.enter_stage(message.name, message.detail)
                elif isinstance(message, EngineReady):
                    assert self._started is not None
                    self._started.set_result(message)
                elif isinstance(message, EngineFailed):
                    cause = error_of(message.kind, message.message)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._lost(cause)

    def _deliver(self, news: EngineOutputs) -> None:
        self.stats = news.stats
        for output in news.outputs:
            if output.finish_reason is not None:
                self._service_rate.count(news.timestamp)
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:  # else its reader has left, and the abort is on its way
                mailbox.put(output)

    async def _lost(self, cause: PagodaError | None) -> None:
        """The connection ended, so the core is gone or going."""
        exit_text = await self._reap()
        message = str(cause) if cause is not None else f"the engine process {exit_text}"
        self.health.transition(EngineState.DEAD, message)
        self.stats = EngineStats()
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineDeadError(f"the engine was lost while the request was in it ({message}); send it again"))
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(cause or EngineDeadError(message))
            if self._is_ending:
                self._started.exception()  # nobody waits for it any more

    async def _reap(self) -> str:
        """Wait for the child, by force if it lingers, and say how it ended."""
        assert self._child is not None
        deadline = time.monotonic() + _KILL_AFTER_SECONDS
        while self._child.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self._child.pid, signal.SIGKILL)
                self._child.wait()
            await asyncio.sleep(0.01)
        code = self._child.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    async def shutdown(self) -> None:
        """End the core's process, by force after a few seconds."""
        self._is_ending = True
        self._send(Shutdown())
        if self._reading is not None:
            done, _ = await asyncio.wait([self._reading], timeout=_KILL_AFTER_SECONDS)
            if not done and self._child is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._child.pid, signal.SIGKILL)
            await asyncio.wait([self._reading])
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._board is not None:
            self._board.close()
            self._board = None


def _core_fields(config: PagodaConfig) -> dict[str, object]:
    """The configuration for the core, without what only the server may know."""
    fields = asdict(config)
    del fields["api_keys"]
    return fields
