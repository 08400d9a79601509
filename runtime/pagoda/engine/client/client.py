"""The engine as the server sees it: requests in, streams of outputs out, one health.

`EngineClient` is the seam; `ProcessEngineClient` runs the core in a process of its own and looks after it: it notices at once
when the core exits, within a timeout when it is stuck, fails its requests with an error that invites a retry, and then either
restarts the core or leaves the engine dead, as `on_engine_failure` says.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.core_handle import EngineCoreHandle
from pagoda.engine.client.output_collector import RequestOutputCollector
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.restarts import RestartPolicy
from pagoda.engine.client.service_rate import ServiceRate
from pagoda.engine.client.watchdog import Watchdog
from pagoda.engine.health import EngineHealth, EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    EngineRanks,
    EngineReady,
    EngineStartupPhase,
    EngineStats,
    ResetPrefixCache,
    Shutdown,
)
from pagoda.errors import (
    EngineDeadError,
    EngineNotReadyError,
    ErrorKind,
    PagodaError,
    QueueFullError,
    error_of,
)
from pagoda.fair_turns import has_place
from pagoda.parallel.rank_health import RankHealth
from pagoda.request import EngineRequest

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5.0
_EXIT_SECONDS = 0.5  # from a core's disconnect to the end of its process; then it is killed
_WATCH_SECONDS = 0.25
_MAX_UNSENT_BYTES = 64 * 2**20  # of requests that the core has not read; past that requests are refused


class EngineClient(ABC):
    """An engine that takes requests. Used from one event loop.

    `configured` is set once the first core was sent its configuration; `ready` holds the engine's limits once it has started.
    """

    def __init__(self, name: str = "engine") -> None:
        self.health = EngineHealth(name)
        self.configured = asyncio.Event()
        self.ready: EngineReady | None = None

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its last step."""
        return EngineStats()

    @property
    def ranks(self) -> list[RankHealth]:
        """The last report on the processes of its ranks; empty where the core has no other."""
        return []

    @property
    def replicas(self) -> Sequence[EngineClient]:
        """The replicas, where there are several."""
        return ()

    @property
    def heartbeat(self) -> EngineHeartbeat | None:
        """The core's last heartbeat; None without a core."""
        return None

    @abstractmethod
    async def start(self) -> None:
        """Start the engine; returns when it is ready. Raises a `PagodaError` when the start fails."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Run a request; its outputs as they come, the last one with a `finish_reason`.

        `request_id` may be that of another request, running or not; outputs have the engine's own, which begins with it.
        Raises `EngineNotReadyError`, `EngineDeadError`, `QueueFullError` or `InvalidRequestError` in place of the first
        output, and `EngineDeadError` later if the engine fails. Closing the iterator aborts the request in the engine.
        """

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Let no request that is submitted from now on find what is cached. Raises `EngineNotReadyError` without an engine."""

    @abstractmethod
    async def shutdown(self) -> None:
        """End the engine; what still runs gets `EngineDeadError`."""


class ProcessEngineClient(EngineClient):
    """The core in a child process with a watchdog, restarted when it fails.

    `name`: its name in the log. `environment`: variables that the core gets beside those of this process. `launched`: a
    process for the first core.
    """

    def __init__(
        self,
        config: PagodaConfig,
        *,
        name: str = "engine",
        environment: Mapping[str, str] | None = None,
        launched: PrelaunchedProcess | None = None,
    ) -> None:
        super().__init__(name)
        self._config = config
        self._environment = environment
        self._launched = launched
        self._stats = EngineStats()
        self._ranks: list[RankHealth] = []
        self._request_numbers = itertools.count()
        self._collectors: dict[str, RequestOutputCollector] = {}  # by the engine's request id
        self._num_of: Counter[str] = Counter()  # collectors of each tenant that has any
        self._service_rate = ServiceRate()
        self._restarts = RestartPolicy(config.on_engine_failure, config.max_engine_restarts)
        self._pause: float | None = None  # before the next core; None: there will be none
        self._child: EngineCoreHandle | None = None
        self._has_failed = False  # the core has failed, though its process may still exist
        self._supervising: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineReady] | None = None
        self._ending = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of the core, while there is one."""
        return None if self._child is None else self._child.pid

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._collectors)

    @property
    @override
    def stats(self) -> EngineStats:
        return self._stats

    @property
    @override
    def ranks(self) -> list[RankHealth]:
        return self._ranks

    @property
    @override
    def heartbeat(self) -> EngineHeartbeat | None:
        return None if self._child is None else self._child.heartbeat

    def pin_num_blocks(self, num_blocks: int) -> None:
        """Set the number of KV blocks of cores started from now on, for any free memory."""
        self._config = replace(self._config, num_gpu_blocks_override=num_blocks)

    # ---- requests -------------------------------------------------------------------------------------------------

    @override
    async def submit(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        tenant = request.tenant
        child = self._check_queue(tenant)
        if not self._collectors:
            self._service_rate.resume(time.monotonic())
        # The engine's id is unique: a client may reuse an id, and outputs of the first request must not reach the second.
        request_id = f"{request.request_id}#{next(self._request_numbers)}"
        collector = self._collectors[request_id] = RequestOutputCollector()
        self._num_of[tenant] += 1
        is_over = False
        try:
            child.send(replace(request, request_id=request_id))
            while not is_over:
                output = await collector.get()
                is_over = output.finish_reason is not None
                if output.error_kind is not None:
                    raise self._error_of(output.error_kind, output.error or "the request failed")
                yield output
        finally:
            # The one place where a request is removed: finished, failed, closed by its reader or cancelled.
            del self._collectors[request_id]
            self._num_of[tenant] -= 1
            if not self._num_of[tenant]:
                del self._num_of[tenant]
            if not is_over:
                child.send(AbortRequests([request_id]))

    @override
    def reset_prefix_cache(self) -> None:
        if self._child is None or not self._child.is_connected:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        self._child.send(ResetPrefixCache())

    def _check_queue(self, tenant: str) -> EngineCoreHandle:
        """The core, if it takes one more request of `tenant`; else raises the reason."""
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        child = self._child
        if not self.health.accepts_requests or self.ready is None or child is None or not child.is_connected:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        # The core knows which of a tenant's requests run; here all of them may.
        max_num_seqs = self.ready.max_num_seqs
        waiting = len(self._collectors) - max_num_seqs
        num_own = self._num_of[tenant]
        num_tenants = len(self._num_of) + (num_own == 0)
        if not has_place(waiting, self._config.max_num_waiting, num_own - max_num_seqs, num_tenants):
            raise self._error_of(
                ErrorKind.QUEUE_FULL, f"{waiting} requests are waiting, as many as max_num_waiting allows"
            )
        if child.num_unsent_bytes > _MAX_UNSENT_BYTES:
            raise self._error_of(
                ErrorKind.QUEUE_FULL, "the engine core is not reading requests: its socket buffer is full"
            )
        return child

    def _error_of(self, kind: ErrorKind, message: str) -> PagodaError:
        if kind is ErrorKind.QUEUE_FULL:
            waiting = len(self._collectors) - (self.ready.max_num_seqs if self.ready is not None else 0)
            return QueueFullError(message, self._service_rate.seconds_until_served(waiting))
        return error_of(kind, message)

    def _deliver(self, message: EngineOutputs) -> None:
        if message.stats.degradation != self._stats.degradation:
            self._note_degradation(message.stats.degradation)
        self._stats = message.stats
        for output in message.outputs:
            if output.finish_reason is not None and output.error_kind is None:
                self._service_rate.count(message.timestamp)
            collector = self._collectors.get(output.request_id)
            if collector is not None:  # else its reader has closed it, and the abort was sent
                collector.put(output)

    def _note_degradation(self, degradation: str) -> None:
        if self.health.accepts_requests:
            state = EngineState.DEGRADED if degradation else EngineState.READY
            self.health.transition(state, degradation or "full capacity again")

    # ---- supervision --------------------------------------------------------------------------------------------

    @override
    async def start(self) -> None:
        self._started = asyncio.get_running_loop().create_future()
        self._supervising = asyncio.create_task(self._supervise(), name="engine-supervisor")
        await self._started

    async def _supervise(self) -> None:
        """Run cores, one after the other, until one may not be replaced."""
        while True:
            self._pause = None
            self._restarts.core_started(time.monotonic())
            try:
                await self._run_core()
            except Exception as error:  # an internal error must not leave an engine without supervision
                logger.exception("the engine process could not be run")
                self._core_failed(EngineDeadError(f"the engine process could not be run: {error}"))
            if self._ending.is_set() or self._pause is None:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self._pause)
                return

    async def _run_core(self) -> None:
        """Run one core from its start to its end."""
        self._has_failed = False
        launched, self._launched = self._launched, None
        child = self._child = await EngineCoreHandle.start(self._config, self._environment, launched)
        self.configured.set()
        if self._ending.is_set():  # `shutdown` was called before there was a core
            child.send(Shutdown())
        watching = asyncio.create_task(self._watch(child), name="engine-watchdog")
        try:
            while (message := await child.receive()) is not None:
                if isinstance(message, EngineOutputs):
                    self._deliver(message)
                elif isinstance(message, EngineRanks):
                    self._ranks = message.ranks
                elif isinstance(message, EngineStartupPhase):
                    if self.health.state is EngineState.STARTING:  # else the server is being stopped meanwhile
                        self.health.enter_phase(message.name, message.detail)
                elif isinstance(message, EngineReady):
                    self._core_ready(message)
                elif isinstance(message, EngineFailed):
                    self._core_failed(error_of(message.kind, message.message))
        finally:
            watching.cancel()
            exit_text = await child.reap(_SHUTDOWN_SECONDS if self._ending.is_set() else _EXIT_SECONDS)
            self._child = None
            self._stats = EngineStats()
        self._core_failed(EngineDeadError(f"the engine process {exit_text}", was_killed=child.was_killed_by_others))

    def _core_ready(self, ready: EngineReady) -> None:
        assert self._started is not None
        self.ready = ready
        if self.health.state is EngineState.STARTING:
            self.health.transition(EngineState.READY, "the engine core has started")
        if not self._started.done():
            self._started.set_result(ready)

    def _core_failed(self, cause: PagodaError) -> None:
        """The core has failed: unready, and its requests failed, now and not when its process has exited."""
        assert self._started is not None
        if self._has_failed or self._ending.is_set():
            return
        self._has_failed = True
        self._ranks = [replace(rank, is_up=False) for rank in self._ranks]
        may_restart = self._started.done() and self.health.state not in (EngineState.DRAINING, EngineState.DEAD)
        self._pause = self._restarts.backoff(time.monotonic()) if may_restart else None
        if self._pause is None:
            self.health.transition(EngineState.DEAD, str(cause))
        else:
            when = f"{self._restarts.attempt}, in {self._pause:g} s"
            self.health.transition(EngineState.STARTING, str(cause))
            self.health.enter_phase("restart", when)
            logger.warning("restarting the %s: %s", self.health.name, when)
        self._fail_requests(str(cause), was_killed=isinstance(cause, EngineDeadError) and cause.was_killed)
        if not self._started.done():
            self._started.set_exception(cause)

    async def _watch(self, child: EngineCoreHandle) -> None:
        """The watchdog: kill a core that does not start in time, or that is stuck. `_run_core` then handles its exit."""
        start_timeout = self._config.engine_start_timeout_seconds
        deadline = time.monotonic() + start_timeout
        watchdog = Watchdog(self._config.engine_stall_timeout_seconds)
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            heartbeat = child.heartbeat
            failure: str | None = None
            if heartbeat.is_up:
                failure = watchdog.check(heartbeat, now)
            elif now > deadline:
                failure = (
                    f"the engine was not ready after engine_start_timeout_seconds={start_timeout:g} "
                    f"(stage: {self.health.phase} {self.health.detail})"
                )
            if failure is not None and not self._ending.is_set():
                logger.error("%s; killing it", failure)
                self._core_failed(EngineDeadError(failure))
                await child.kill(dump_stacks=True)
                return

    def _fail_requests(self, cause: str, *, was_killed: bool = False) -> None:
        error = EngineDeadError(
            f"the engine failed while it was running this request ({cause}); send it again", was_killed=was_killed
        )
        for collector in self._collectors.values():
            collector.fail(error)

    @override
    async def shutdown(self) -> None:
        self._ending.set()
        if self._supervising is None:
            return
        if self._child is not None:
            self._child.send(Shutdown())
        done, _ = await asyncio.wait([self._supervising], timeout=_SHUTDOWN_SECONDS)
        if not done and self._child is not None:
            await self._child.kill()
        await self._supervising
        self._fail_requests("the server is shutting down")
        if self.health.state is not EngineState.DEAD:
            self.health.transition(EngineState.DEAD, "shut down", is_expected=True)
