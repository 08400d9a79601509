"""The engine core in a process of its own, looked after.

`ProcessEngineClient` notices at once when the core exits, within a timeout when it is stuck, has its requests replayed or
failed with an error that invites a retry, and then either restarts the core or leaves the engine dead, as `on_engine_failure`
says.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from typing_extensions import override

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.core_handle import EngineCoreHandle
from pagoda.engine.client.interface import EngineClient, TraceListener
from pagoda.engine.client.output_collector import RequestOutputCollector
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.replay import Replay
from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue, queue_full
from pagoda.engine.client.restarts import RestartPolicy
from pagoda.engine.client.service_rate import ServiceRate
from pagoda.engine.client.watchdog import Watchdog
from pagoda.engine.health import NOT_LOADED, EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import (
    AbortRequests,
    AdapterLoaded,
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    EngineRanks,
    EngineReady,
    EngineStartupPhase,
    EngineStats,
    EngineTrace,
    LoadAdapter,
    Reconfigure,
    Reconfigured,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    SleepState,
    TraceSteps,
    UnloadAdapter,
    WakeUp,
)
from pagoda.errors import (
    ConfigError,
    EngineDeadError,
    EngineNotReadyError,
    ErrorKind,
    InvalidRequestError,
    PagodaError,
    QueueFullError,
    error_of,
)
from pagoda.parallel.rank_health import RankHealth
from pagoda.platform.hardware import memory_report
from pagoda.process_control import NICENESS
from pagoda.request import EngineRequest

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5.0
_EXIT_SECONDS = 0.5  # from a core's disconnect to the end of its process; then it is killed
_WATCH_SECONDS = 0.25
SPARE_PROCESS_BYTES = 2 * 2**30  # available memory below which there is no spare process, which takes about 0.3 GiB
_MAX_UNSENT_BYTES = 64 * 2**20  # of requests that the core has not read; past that requests are refused


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
        self._adapters: dict[LoraAdapter, asyncio.Future[str | None]] = {}  # that the core was asked to read
        self._queue = RequestQueue()
        self._service_rate = ServiceRate()
        self._restarts = RestartPolicy(config.on_engine_failure, config.max_engine_restarts)
        self._pause: float | None = None  # before the next core; None: there will be none
        self._child: EngineCoreHandle | None = None
        self._has_failed = False  # the core has failed, though its process may still exist
        self._supervising: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineReady] | None = None
        self._ending = asyncio.Event()
        self._answer: asyncio.Future[str] | None = None  # of a core that was asked something, one thing at a time
        self._asking = asyncio.Lock()
        self._trace_listeners: list[tuple[TraceListener, bool]] = []  # and whether it wants kernels
        self._is_ready = asyncio.Event()  # not between the failure of a core and the next; set when there will be none

    @property
    def pid(self) -> int | None:
        """Process id of the core, while there is one."""
        return None if self._child is None else self._child.pid

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return self._queue.num_requests

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
    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        self._check_queue(self._check_ready(), tenant, count)
        return QueuePlaces(self._queue, tenant, count)

    @override
    async def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        child = self._check_ready()
        if places is not None:
            places.take()
            request = replace(request, has_place=True)
        elif not request.has_place:
            self._check_queue(child, request.tenant, 1)
        if not self._queue.num_requests:
            self._service_rate.resume(time.monotonic())
        self._queue.add(request.tenant)
        replay = Replay(request, self._config.max_request_replays)
        try:
            while True:
                try:
                    async with aclosing(self._run(child, replay.request())) as outputs:
                        async for output in outputs:
                            yield replay.deliver(output)
                    return
                except EngineDeadError as error:
                    if self._pause is None or not replay.engine_failed(error):
                        raise
                self.num_replays += 1
                child = await self._next_core()
        finally:
            self._queue.remove(request.tenant)

    async def _run(self, child: EngineCoreHandle, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """The outputs of a request in one core."""
        # The engine's id is unique: a client may reuse an id, and outputs of the first request must not reach the second.
        request_id = f"{request.request_id}#{next(self._request_numbers)}"
        collector = self._collectors[request_id] = RequestOutputCollector()
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
            if not is_over:
                child.send(AbortRequests([request_id]))

    async def _next_core(self) -> EngineCoreHandle:
        """The core that comes after one that failed, once it is ready; raises where there is none."""
        while not self._is_ready.is_set():  # another may fail before this is run
            await self._is_ready.wait()
        if self._child is None or not self._child.is_connected:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        return self._child

    @override
    def reset_prefix_cache(self) -> None:
        if self._child is None or not self._child.is_connected:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        self._child.send(ResetPrefixCache())

    @override
    def trace(self, listener: TraceListener, *, kernels: bool = False) -> Callable[[], None]:
        entry = (listener, kernels)
        self._trace_listeners.append(entry)
        self._trace_steps()  # also for the second one: it gets all blocks

        def end() -> None:
            self._trace_listeners.remove(entry)
            if kernels or not self._trace_listeners:
                self._trace_steps()

        return end

    def _trace_steps(self) -> None:
        """Tell the core, if there is one, whether to record."""
        if self._child is not None and self._child.is_connected and not self._has_failed:
            kernels = any(wants for _, wants in self._trace_listeners)
            self._child.send(TraceSteps(bool(self._trace_listeners), kernels))

    @override
    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        if self._child is None or not self._child.is_connected or not self._is_ready.is_set():
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        refusal = await self._ask(self._child, Reconfigure(dict(settings)))
        if refusal:
            raise ConfigError(refusal)

    @override
    async def sleep(self, level: int) -> None:
        child = self._check_ready()
        if self._queue.num_requests:
            raise EngineNotReadyError(
                f"{self._queue.num_requests} requests are in the engine: it sleeps when it is idle"
            )
        self.health.transition(EngineState.SLEEPING, f"level {level}")
        self.sleep_level = level
        refusal = await self._ask(child, Sleep(level))
        if refusal:
            self._awake(refusal)
            raise EngineNotReadyError(refusal)

    @override
    async def wake_up(self) -> None:
        if self.health.state is not EngineState.SLEEPING:
            await self._next_core()
            return
        child = self._child
        if child is None or not child.is_connected:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        self.health.transition(EngineState.STARTING, "waking up", is_expected=True)
        self.health.enter_phase("wake-up")
        self._is_ready.clear()
        await self._ask(child, WakeUp())
        self._awake("awake")

    def _awake(self, cause: str) -> None:
        self.sleep_level = 0
        self._is_ready.set()
        if self.health.state in (EngineState.STARTING, EngineState.SLEEPING):
            self.health.transition(EngineState.STARTING, cause, is_expected=True)
            self.health.transition(EngineState.READY, cause)

    async def _ask(self, child: EngineCoreHandle, message: Reconfigure | Sleep | WakeUp) -> str:
        """Send `message` and wait for the answer: why the core does not do it, if so. Raises where it fails meanwhile."""
        async with self._asking:
            answer = self._answer = asyncio.get_running_loop().create_future()
            child.send(message)
            return str(await answer)

    @override
    async def load_adapter(self, adapter: LoraAdapter) -> None:
        child = self._child
        if child is None or not child.is_connected or not self._is_ready.is_set():  # requests may still be refused
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        loading = self._adapters.get(adapter)
        if loading is None:
            loading = self._adapters[adapter] = asyncio.get_running_loop().create_future()
            child.send(LoadAdapter(adapter))
        if (error := await asyncio.shield(loading)) is not None:
            raise InvalidRequestError(error)

    @override
    def unload_adapter(self, adapter: LoraAdapter) -> None:
        if self._child is not None and self._child.is_connected:
            self._child.send(UnloadAdapter(adapter))

    def _take_adapter(self, message: AdapterLoaded) -> None:
        loading = self._adapters.pop(message.adapter, None)
        if loading is not None and not loading.done():
            loading.set_result(message.error)

    def _check_ready(self) -> EngineCoreHandle:
        """The core, if it takes requests; else raises the reason."""
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        child = self._child
        if not self.health.accepts_requests or self.ready is None or child is None or not child.is_connected:
            raise EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")
        return child

    def _check_queue(self, child: EngineCoreHandle, tenant: str, count: int) -> None:
        """Raise `QueueFullError` where `count` more of `tenant` have no place."""
        # The core knows which of a tenant's requests run; here all of them may.
        assert self.ready is not None
        max_num_seqs, limit = self.ready.max_num_seqs, self._config.max_num_waiting
        if not self._queue.has_room(tenant, count, num_running=max_num_seqs, limit=limit):
            waiting = max(0, self._queue.num_requests - max_num_seqs)
            raise self._error_of(ErrorKind.QUEUE_FULL, queue_full(waiting, count))
        if child.num_unsent_bytes > _MAX_UNSENT_BYTES:
            raise self._error_of(
                ErrorKind.QUEUE_FULL, "the engine core is not reading requests: its socket buffer is full"
            )

    def _error_of(self, kind: ErrorKind, message: str) -> PagodaError:
        if kind is ErrorKind.QUEUE_FULL:
            waiting = self._queue.num_requests - (self.ready.max_num_seqs if self.ready is not None else 0)
            return QueueFullError(message, self._service_rate.seconds_until_served(waiting))
        return error_of(kind, message)

    def _deliver(self, message: EngineOutputs) -> None:
        self._restarts.has_served = self._restarts.has_served or bool(message.outputs)
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
        if self._supervising is not None:
            await self._supervising
            self._ending.clear()
            self._is_ready.clear()
            self._restarts = RestartPolicy(self._config.on_engine_failure, self._config.max_engine_restarts)
            self.ready = None
        if self.health.state in NOT_LOADED:
            self.health.load("loading")
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
        niceness, self.start_niceness = self.start_niceness, 0
        child = self._child = await EngineCoreHandle.start(self._config, self._environment, launched, niceness=niceness)
        self.configured.set()
        if self._ending.is_set():  # `shutdown` was called before there was a core
            child.send(Shutdown())
        watching = asyncio.create_task(self._watch(child), name="engine-watchdog")
        spare: asyncio.Task[None] | None = None
        try:
            while (message := await child.receive()) is not None:
                if isinstance(message, EngineOutputs):
                    self._deliver(message)
                elif isinstance(message, EngineTrace):
                    for listener, _ in list(self._trace_listeners):
                        listener(0, message)
                elif isinstance(message, EngineRanks):
                    self._ranks = message.ranks
                elif isinstance(message, AdapterLoaded):
                    self._take_adapter(message)
                elif isinstance(message, EngineStartupPhase):
                    if self.health.state is EngineState.STARTING:  # else the server is being stopped meanwhile
                        self.health.enter_phase(message.name, message.detail)
                elif isinstance(message, SleepState | Reconfigured):
                    if self._answer is not None and not self._answer.done():
                        self._answer.set_result(message.error)
                elif isinstance(message, EngineReady):
                    self._core_ready(message)
                    spare = asyncio.create_task(self._launch_spare(), name="engine-spare")
                elif isinstance(message, EngineFailed):
                    self._core_failed(error_of(message.kind, message.message))
        finally:
            watching.cancel()
            if spare is not None:
                spare.cancel()
            exit_text = await child.reap(_SHUTDOWN_SECONDS if self._ending.is_set() else _EXIT_SECONDS)
            self._child = None
            self._stats = EngineStats()
        self._core_failed(EngineDeadError(f"the engine process {exit_text}", was_killed=child.was_killed_by_others))

    async def _launch_spare(self) -> None:
        """Launch the process of the next core ahead: imports are most of a start.

        Not at the priority of a load: where it is needed before it has them, it must be done soon.
        """
        seconds = self._config.spare_process_seconds
        if seconds is None or self._launched is not None or self._config.on_engine_failure == "exit":
            return
        await asyncio.sleep(seconds)
        available = memory_report().available
        if available < SPARE_PROCESS_BYTES:
            logger.info("no spare engine process: %d MiB of memory are available", available // 2**20)
            return
        try:
            self._launched = PrelaunchedProcess(niceness=NICENESS)
        except OSError as error:
            logger.warning("no spare engine process: %s", error)

    def _core_ready(self, ready: EngineReady) -> None:
        assert self._started is not None
        self.ready = ready
        if self.health.state is EngineState.STARTING:
            self.health.transition(EngineState.READY, "the engine core has started")
        if self._trace_listeners:
            self._trace_steps()
        self._is_ready.set()
        if not self._started.done():
            self._started.set_result(ready)

    def _core_failed(self, cause: PagodaError) -> None:
        """The core has failed: unready, and its requests failed, now and not when its process has exited."""
        assert self._started is not None
        if self._has_failed or self._ending.is_set():
            return
        self._has_failed = True
        self.sleep_level = 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(cause)
        self._ranks = [replace(rank, is_up=False) for rank in self._ranks]
        may_restart = self._started.done() and self.health.state not in (EngineState.DRAINING, EngineState.DEAD)
        self._pause = self._restarts.backoff(time.monotonic()) if may_restart else None
        if self._pause is None:
            self.health.transition(EngineState.DEAD, str(cause))
            self._is_ready.set()
        else:
            self._is_ready.clear()
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
        """The requests in the core end; as many as may run, from the oldest, may have been running."""
        max_num_seqs = self.ready.max_num_seqs if self.ready is not None else 0
        for loading in self._adapters.values():
            if not loading.done():
                loading.set_result(f"the engine failed while it was loading the adapter ({cause}); load it again")
        self._adapters.clear()
        message = f"the engine failed while it was running this request ({cause}); send it again"
        for index, collector in enumerate(self._collectors.values()):
            may_have_run = index < max_num_seqs or collector.has_output
            collector.fail(EngineDeadError(message, was_killed=was_killed, may_have_run=may_have_run))

    @override
    def configure(self, config: PagodaConfig) -> None:
        self._config = config

    @override
    def use_process(self, process: PrelaunchedProcess) -> None:
        if self._launched is None:
            self._launched = process
        else:
            process.close()

    @override
    async def unload(self, cause: str) -> None:
        await self._end("the model is being unloaded")
        self.health.unload(cause)

    @override
    async def shutdown(self) -> None:
        await self._end("the server is shutting down")
        if self._supervising is not None and self.health.state is not EngineState.DEAD:
            self.health.transition(EngineState.DEAD, "shut down", is_expected=True)

    async def _end(self, cause: str) -> None:
        """End the core and its spare; requests that are left fail with `cause`."""
        self._ending.set()
        self._is_ready.set()
        if self._supervising is None:
            return
        if self._child is not None:
            self._child.send(Shutdown())
        done, _ = await asyncio.wait([self._supervising], timeout=_SHUTDOWN_SECONDS)
        if not done and self._child is not None:
            await self._child.kill()
        await self._supervising
        if self._launched is not None:
            self._launched.close()
            self._launched = None
        self._fail_requests(cause)
