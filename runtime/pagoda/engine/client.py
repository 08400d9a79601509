"""The engine as the server sees it: requests in, streams of outputs out, one health.

`EngineClient` is the seam; `ProcessEngineClient` runs the core in a process of its own and looks after it: it notices at once
when the core dies, within a bound when it is stuck, ends what was running with an error that invites a retry, and then either
starts a new core or leaves the engine dead, as `on_engine_failure` says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import suppress

from pagoda.config.schema import PagodaConfig
from pagoda.engine.child import CoreChild
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
)
from pagoda.engine.progress_board import EngineProgress
from pagoda.engine.service_rate import ServiceRate
from pagoda.engine.watchdog import describe_stall
from pagoda.errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    PagodaError,
    QueueFullError,
    error_of,
)

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5.0
_WATCH_SECONDS = 0.25
_FIRST_BACK_OFF_SECONDS = 0.5
_LONGEST_BACK_OFF_SECONDS = 30.0
_HEALTHY_SECONDS = 600.0  # a core that lived this long has earned its restarts back


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
    """The core in a child process that is watched, and started anew when it fails."""

    def __init__(self, config: PagodaConfig) -> None:
        super().__init__()
        self._config = config
        self._mailboxes: dict[str, Mailbox] = {}
        self._service_rate = ServiceRate()
        self._child: CoreChild | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._failure: PagodaError | None = None
        self._is_ending = False

    @property
    def pid(self) -> int | None:
        """Process id of the core, while there is one."""
        return None if self._child is None else self._child.pid

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._mailboxes)

    @property
    def progress(self) -> EngineProgress | None:
        """The core's last sign of life, while there is a core."""
        return None if self._child is None else self._child.progress

    # ---- requests -------------------------------------------------------------------------------------------------

    async def submit(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `EngineClient.submit`."""
        self._admit(request)
        child = self._child
        assert child is not None
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        child.send(request)
        is_over = False
        try:
            while not is_over:
                output = await mailbox.get()
                is_over = output.finish_reason is not None
                if output.error_kind is not None:
                    raise error_of(output.error_kind, output.error or "the request failed")
                yield output
        finally:
            # The one place where a request leaves: ended, failed, closed by its reader or cancelled.
            del self._mailboxes[request.request_id]
            if not is_over:
                child.send(AbortRequests([request.request_id]))

    def _admit(self, request: EngineRequest) -> None:
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        if not self.health.accepts_requests or self.ready is None:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.stage})")
        if request.request_id in self._mailboxes:
            raise InvalidRequestError(f"a request with id {request.request_id!r} is running already", "request_id")
        waiting = len(self._mailboxes) - self.ready.max_num_seqs
        if waiting >= self._config.max_num_waiting:
            raise QueueFullError(
                f"{waiting} requests are waiting, as many as max_num_waiting allows",
                self._service_rate.seconds_until_served(waiting),
            )

    def _deliver(self, news: EngineOutputs) -> None:
        self.stats = news.stats
        for output in news.outputs:
            if output.finish_reason is not None:
                self._service_rate.count(news.timestamp)
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:  # else its reader has left, and the abort is on its way
                mailbox.put(output)

    # ---- the core's life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the core and wait until it is ready; see `EngineClient.start`."""
        started: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._supervising = asyncio.create_task(self._supervise(started), name="engine-supervisor")
        self.ready = await started

    async def _supervise(self, started: asyncio.Future[EngineReady]) -> None:
        """Run cores, one after the other, until one may not be replaced."""
        failures = 0
        while True:
            since = time.monotonic()
            cause = await self._run_core(started)
            if self._is_ending:
                break
            failures = 1 if time.monotonic() - since > _HEALTHY_SECONDS else failures + 1
            was_ready = started.done()
            may_restart = (
                was_ready
                and self._config.on_engine_failure == "restart"
                and failures <= self._config.max_engine_restarts
            )
            self.health.transition(EngineState.STARTING if may_restart else EngineState.DEAD, str(cause))
            self._fail_requests(str(cause))
            if not may_restart:
                if not was_ready:
                    started.set_exception(cause)
                break
            back_off = min(_LONGEST_BACK_OFF_SECONDS, _FIRST_BACK_OFF_SECONDS * 2 ** (failures - 1))
            self.health.enter_stage(
                "restart", f"attempt {failures} of {self._config.max_engine_restarts}, in {back_off:g} s"
            )
            await asyncio.sleep(back_off)

    async def _run_core(self, started: asyncio.Future[EngineReady]) -> PagodaError:
        """Run one core from its start to its end; returns why it ended."""
        self._failure = None
        self._child = await CoreChild.start(self._config)
        watching = asyncio.create_task(self._watch(self._child), name="engine-watchdog")
        try:
            while (message := await self._child.receive()) is not None:
                if isinstance(message, EngineOutputs):
                    self._deliver(message)
                elif isinstance(message, EngineStage):
                    self.health.enter_stage(message.name, message.detail)
                elif isinstance(message, EngineReady):
                    self.ready = message
                    self.health.transition(EngineState.READY, "the engine core has started")
                    if not started.done():
                        started.set_result(message)
                elif isinstance(message, EngineFailed):
                    self._failure = error_of(message.kind, message.message)
        finally:
            watching.cancel()
            child, self._child = self._child, None
            self.stats = EngineStats()
        exit_text = await child.reap()
        return self._failure or EngineDeadError(f"the engine process {exit_text}")

    async def _watch(self, child: CoreChild) -> None:
        """Kill a core that starts too slowly, or that is stuck; its end is then noticed like any other."""
        start_timeout = self._config.engine_start_timeout_seconds
        deadline = time.monotonic() + start_timeout
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if self._is_ending:
                return
            if self.health.state is EngineState.STARTING:
                trouble = (
                    f"the engine was not ready after engine_start_timeout_seconds={start_timeout:g} "
                    f"(stage: {self.health.stage} {self.health.detail})"
                    if now > deadline
                    else None
                )
            else:
                trouble = describe_stall(child.progress, now, self._config.engine_stall_timeout_seconds)
            if trouble is not None:
                logger.error("%s; it will be ended", trouble)
                self._failure = EngineDeadError(trouble)
                # Unready and failed now, not when the process is gone.
                if self.health.accepts_requests:
                    self.health.transition(EngineState.STARTING, trouble)
                self._fail_requests(trouble)
                await child.kill(dump_stacks=True)
                return

    def _fail_requests(self, cause: str) -> None:
        error = EngineDeadError(f"the engine was lost while the request was in it ({cause}); send it again")
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    async def shutdown(self) -> None:
        """End the core's process, by force after a few seconds."""
        self._is_ending = True
        if self._supervising is None:
            return
        if self._child is not None:
            self._child.send(Shutdown())
        done, _ = await asyncio.wait([self._supervising], timeout=_SHUTDOWN_SECONDS)
        if not done:
            if self._child is not None:
                await self._child.kill()
            else:
                self._supervising.cancel()  # between two cores, in the back-off
            await asyncio.wait([self._supervising])
        with suppress(asyncio.CancelledError):
            await self._supervising
        self._fail_requests("the server is shutting down")
        if self.health.state is not EngineState.DEAD:
            self.health.transition(EngineState.DEAD, "shut down", is_expected=True)
