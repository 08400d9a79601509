"""Several engines behind one endpoint on one machine (`data_parallel_size`): each has a core, a model and a KV cache.

    submit ─▶ router ─▶ replica 0: core ─▶ its ranks
                   └──▶ replica 1: core ─▶ its ranks

A replica is a `ProcessEngineClient` with its own watchdog and restarts, independent of the others. They share the
machine (compute threads, free memory, GPUs) and the limit of the waiting queue.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.interface import EngineClient, TraceListener
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.client.replay import Replay
from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue, queue_full
from pagoda.engine.data_parallel.health import overall
from pagoda.engine.data_parallel.router import PrefixRouter
from pagoda.engine.health import NOT_LOADED, EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineOutput, EngineReady, EngineStats
from pagoda.errors import (
    ConfigError,
    EngineDeadError,
    EngineNotReadyError,
    PagodaError,
    QueueFullError,
)
from pagoda.parallel.rank_health import RankHealth
from pagoda.platform.threads import affinities_of_replicas
from pagoda.request import EngineRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

logger = logging.getLogger(__name__)

_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


def create_engine_client(
    config: PagodaConfig, launched: PrelaunchedProcess | None = None, name: str = "engine"
) -> EngineClient:
    """The engine that a configuration asks for: one core, or several replicas.

    `launched`: a process for the first of them. `name`: of one core in the log.
    """
    if config.data_parallel_size == 1:
        return ProcessEngineClient(config, name=name, launched=launched)
    return DataParallelClient(config, launched=launched)


def devices_of(replica: int, num_devices: int, visible: str | None) -> str:
    """The GPUs of a replica that needs `num_devices`, as CUDA_VISIBLE_DEVICES has them; `visible`: those of this process."""
    first = replica * num_devices
    if visible is None:
        return ",".join(map(str, range(first, first + num_devices)))
    return ",".join(visible.split(",")[first : first + num_devices])


class DataParallelClient(EngineClient):
    """Replicas, one router, one health.

    `router`: another one than the configuration asks for. `launched`: a process for the core of the first replica.
    """

    def __init__(
        self, config: PagodaConfig, router: PrefixRouter | None = None, launched: PrelaunchedProcess | None = None
    ) -> None:
        super().__init__()
        self._config = config
        num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        num_replicas = config.data_parallel_size
        self._replicas = [
            ProcessEngineClient(
                share,
                name=f"engine replica {index}",
                environment={_DEVICES_VARIABLE: devices_of(index, num_ranks, os.environ.get(_DEVICES_VARIABLE))},
                launched=launched if index == 0 else None,
            )
            for index, share in enumerate(shares_of(config))
        ]
        self.configured = self._replicas[0].configured
        self._queue = RequestQueue()
        self._router = router or PrefixRouter(num_replicas, config.block_size if config.enable_prefix_caching else 0)
        self._is_started = False
        self._is_ending = False
        self._num_blocks: int | None = None  # of each, found out by the first
        self._states = [replica.health.state for replica in self._replicas]
        self.health.subscribe(self._on_own_health)
        for index, replica in enumerate(self._replicas):
            replica.health.subscribe(lambda index=index: self._on_replica(index))  # type: ignore[misc]

    # ---- status ----------------------------------------------------------------------------------------------------

    @property
    @override
    def replicas(self) -> Sequence[ProcessEngineClient]:
        return self._replicas

    @property
    @override
    def stats(self) -> EngineStats:
        return sum_of([replica.stats for replica in self._replicas])

    @property
    @override
    def ranks(self) -> list[RankHealth]:
        """The ranks of all replicas, numbered through."""
        world_size = self._config.tensor_parallel_size * self._config.pipeline_parallel_size
        return [
            replace(rank, rank=index * world_size + rank.rank)
            for index, replica in enumerate(self._replicas)
            for rank in replica.ranks
        ]

    @property
    @override
    def heartbeat(self) -> EngineHeartbeat | None:
        """The steps of all replicas, with the time of the oldest heartbeat among those that are up."""
        found = [one for replica in self._replicas if (one := replica.heartbeat) is not None and one.is_up]
        if not found:
            return None
        return EngineHeartbeat(
            step=sum(one.step for one in found),
            time=min(one.time for one in found),
            scheduled_tokens=sum(one.scheduled_tokens for one in found),
            is_busy=any(one.is_busy for one in found),
        )

    @override
    def reset_prefix_cache(self) -> None:
        """Of every replica; one that is not there has nothing cached."""
        for replica in self.replicas:
            with suppress(EngineNotReadyError):
                replica.reset_prefix_cache()

    @override
    def trace(self, listener: TraceListener, *, kernels: bool = False) -> Callable[[], None]:
        def of_replica(index: int) -> TraceListener:
            return lambda _, trace: listener(index, trace)

        ends = [replica.trace(of_replica(index), kernels=kernels) for index, replica in enumerate(self._replicas)]

        def end() -> None:
            for each in ends:
                each()

        return end

    @override
    async def load_adapter(self, adapter: LoraAdapter) -> None:
        """By every replica that is there; another one reads it with its first request."""
        outcomes = await asyncio.gather(
            *(replica.load_adapter(adapter) for replica in self._replicas), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        failed = [error for error in errors if not isinstance(error, EngineNotReadyError)]
        if failed or len(errors) == len(outcomes):
            raise (failed or errors)[0]

    @override
    def unload_adapter(self, adapter: LoraAdapter) -> None:
        for replica in self._replicas:
            replica.unload_adapter(adapter)

    # ---- requests -------------------------------------------------------------------------------------------------

    @override
    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        """Places in the replicas' queues together; each sequence may go to any of them."""
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        if not self._candidates(set()) or self.ready is None:
            raise self._refusal([])
        max_num_seqs, limit = self.ready.max_num_seqs, self._config.max_num_waiting
        if not self._queue.has_room(tenant, count, num_running=max_num_seqs, limit=limit):
            waiting = max(0, self._queue.num_requests - max_num_seqs)
            raise QueueFullError(queue_full(waiting, count))
        return QueuePlaces(self._queue, tenant, count)

    @override
    async def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        """A request is rerouted if the replica's queue is full, and replayed on another replica if it fails."""
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.health.cause}")
        if places is not None:
            places.take()
            request = replace(request, has_place=True)
        self._queue.add(request.tenant)
        try:
            async with aclosing(self._route(request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._queue.remove(request.tenant)

    async def _route(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """The outputs of the first replica that takes the request, and of those that it is replayed on."""
        replay = Replay(request, self._config.max_request_replays)
        refusals: list[PagodaError] = []
        tried: set[int] = set()
        while True:
            candidates = self._candidates(tried)
            if not candidates:
                if not (refusals and isinstance(refusals[-1], EngineDeadError)):
                    raise self._refusal(refusals)
                await self._next_replica()
                tried.clear()
                continue
            request = replay.request()
            placement = self._router.place(request, candidates)
            tried.add(placement.replica)
            if refusals:
                logger.info("request %s goes to replica %d: %s", request.request_id, placement.replica, refusals[-1])
            has_failed = False
            try:
                outputs = cast("AsyncGenerator[EngineOutput, None]", self._replicas[placement.replica].submit(request))
                async with aclosing(outputs):
                    async for output in outputs:
                        self._router.note_output(placement, output.new_token_ids)
                        yield replay.deliver(output)
                return
            except EngineDeadError as error:
                has_failed = True
                is_over = self._is_ending or self.health.state is EngineState.DEAD
                if is_over or not replay.engine_failed(error):
                    raise
                self.num_replays += 1
                refusals.append(error)
            except (QueueFullError, EngineNotReadyError) as error:
                has_failed = True
                refusals.append(error)
            except PagodaError:
                has_failed = True
                raise
            finally:
                self._router.remove(placement, has_failed=has_failed)

    async def _next_replica(self) -> None:
        """Return once a replica accepts requests; raises where none will."""
        changed = asyncio.Event()
        unsubscribe = [one.subscribe(changed.set) for one in (self.health, *(each.health for each in self._replicas))]
        try:
            while not any(replica.health.accepts_requests for replica in self._replicas):
                if self._is_ending or self.health.state is EngineState.DEAD:
                    raise EngineDeadError(f"the engine is dead: {self.health.cause}")
                changed.clear()
                await changed.wait()
        finally:
            for each in unsubscribe:
                each()

    def _candidates(self, tried: set[int]) -> list[int]:
        """Replicas that a request may be sent to."""
        if not self.health.accepts_requests:
            return []
        return [
            index
            for index, replica in enumerate(self._replicas)
            if index not in tried and replica.health.accepts_requests
        ]

    def _refusal(self, refusals: Sequence[PagodaError]) -> PagodaError:
        """The error of a request that no replica takes: the one with the shortest wait, else the last."""
        full = [error for error in refusals if isinstance(error, QueueFullError)]
        if full:
            return min(full, key=lambda error: error.retry_after_seconds)
        if refusals:
            return refusals[-1]
        return EngineNotReadyError(f"the engine is {self.health.state} (stage: {self.health.phase})")

    # ---- state ----------------------------------------------------------------------------------------------------

    @override
    async def start(self) -> None:
        """Start the first replica, which measures how much memory each may take, then the others concurrently."""
        if self._is_ending:  # it was unloaded, or is dead
            self._is_ending = self._is_started = False
        if self.health.state in NOT_LOADED:
            self.health.load("loading")
        first, *others = self._replicas
        await first.start()
        assert first.ready is not None
        if first.ready.device == "cpu":
            # If each measured free memory itself, it would count memory that another is about to allocate.
            self._num_blocks = first.ready.num_blocks
            for replica in self._replicas:
                replica.pin_num_blocks(self._num_blocks)
        await asyncio.gather(*(replica.start() for replica in others))
        limits = [replica.ready for replica in self._replicas if replica.ready is not None]
        if {ready.device for ready in limits} != {first.ready.device}:
            raise ConfigError(
                f"data_parallel_size={len(limits)}: replicas found different devices "
                f"({', '.join(ready.device for ready in limits)}); there must be a GPU for each rank of each replica"
            )
        self.ready = limits_of(limits)
        self._is_started = True
        self._update_health()

    @override
    def configure(self, config: PagodaConfig) -> None:
        self._config = config
        for replica, share in zip(self._replicas, shares_of(config), strict=True):
            replica.configure(share)
            if self._num_blocks is not None:
                replica.pin_num_blocks(self._num_blocks)

    @override
    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Of each replica; one that is not there starts with what `configure` says. What one may not have none may."""
        outcomes = []
        settings = dict(settings)
        if "max_num_waiting" in settings:
            settings["max_num_waiting"] = _part_of_queue(settings["max_num_waiting"], len(self._replicas))
        for replica in self._replicas:
            try:
                await replica.reconfigure(settings)
            except EngineNotReadyError as error:
                outcomes.append(error)
        if len(outcomes) == len(self._replicas):
            raise outcomes[0]

    @override
    async def sleep(self, level: int) -> None:
        if self._queue.num_requests:
            raise EngineNotReadyError(
                f"{self._queue.num_requests} requests are in the engine: it sleeps when it is idle"
            )
        self.health.transition(EngineState.SLEEPING, f"level {level}")
        self.sleep_level = level
        await asyncio.gather(*(replica.sleep(level) for replica in self._replicas if replica.health.accepts_requests))

    @override
    async def wake_up(self) -> None:
        if self.health.state is EngineState.SLEEPING:
            self.health.transition(EngineState.STARTING, "waking up", is_expected=True)
        await asyncio.gather(*(replica.wake_up() for replica in self._replicas))
        self.sleep_level = 0
        self._update_health()

    @override
    async def unload(self, cause: str) -> None:
        self._is_ending = True
        await asyncio.gather(*(replica.unload(cause) for replica in self._replicas))
        self.ready = None
        self.health.unload(cause)

    @override
    async def shutdown(self) -> None:
        self._is_ending = True
        await asyncio.gather(*(replica.shutdown() for replica in self._replicas))
        if self.health.state is not EngineState.DEAD:
            self.health.transition(EngineState.DEAD, "shut down", is_expected=True)

    def _on_replica(self, index: int) -> None:
        """Handle a replica's change of state or start-up stage."""
        health = self._replicas[index].health
        before, self._states[index] = self._states[index], health.state
        ready = self._replicas[index].ready
        if before is EngineState.STARTING and health.accepts_requests and ready is not None:
            self._router.set_capacity(index, ready.num_blocks, ready.block_size)
        if self._is_ending:
            return
        if health.state is EngineState.STARTING and self.health.state is EngineState.STARTING:
            self.health.enter_phase(health.phase, f"replica {index} of {len(self._replicas)} {health.detail}".rstrip())
        self._update_health()

    def _update_health(self) -> None:
        """Derive the state from the replicas' states."""
        if self.health.state in (EngineState.DEAD, EngineState.SLEEPING):
            return
        state, cause = overall(self.health.state, [replica.health for replica in self._replicas])
        if self._is_started or state is EngineState.DEAD:
            self.health.transition(state, cause)

    def _on_own_health(self) -> None:
        """Drain all replicas: none is restarted from then on."""
        if self.health.state is EngineState.DRAINING:
            for replica in self._replicas:
                if replica.health.state not in (EngineState.DRAINING, EngineState.DEAD):
                    replica.health.transition(EngineState.DRAINING, str(self.health.cause))


def shares_of(config: PagodaConfig) -> list[PagodaConfig]:
    """The settings of each replica."""
    num_replicas, num_ranks = config.data_parallel_size, config.tensor_parallel_size * config.pipeline_parallel_size
    # What a replica's failure ends goes on in another one at once, not in the same one later.
    waiting = _part_of_queue(config.max_num_waiting, num_replicas)
    share = replace(config, max_num_waiting=waiting, max_request_replays=0)
    affinities = [config.cpu_thread_affinity] * num_replicas
    if config.device != "cuda":
        affinities = affinities_of_replicas(
            config.cpu_thread_affinity, config.threads, num_replicas=num_replicas, num_ranks=num_ranks
        )
    return [
        replace(share, cpu_thread_affinity=affinities[index], kv_events_config=config.kv_events.of_replica(index))
        for index in range(num_replicas)
    ]


def _part_of_queue(max_num_waiting: int, num_replicas: int) -> int:
    return -(-max_num_waiting // num_replicas)


def sum_of(stats: Sequence[EngineStats]) -> EngineStats:
    """The figures of several engines as those of one. `step_seconds`: the longest."""
    return EngineStats(
        step=sum(one.step for one in stats),
        expert_load=max(
            (one.expert_load for one in stats if one.expert_load is not None),
            key=lambda load: load.imbalance,
            default=None,
        ),
        num_running=sum(one.num_running for one in stats),
        num_waiting=sum(one.num_waiting for one in stats),
        num_blocks=sum(one.num_blocks for one in stats),
        num_blocks_in_use=sum(one.num_blocks_in_use for one in stats),
        prefix_cache_queries=sum(one.prefix_cache_queries for one in stats),
        prefix_cache_hits=sum(one.prefix_cache_hits for one in stats),
        prefix_cache_misses={
            reason: sum(one.prefix_cache_misses.get(reason, 0) for one in stats)
            for reason in dict.fromkeys(reason for one in stats for reason in one.prefix_cache_misses)
        },
        num_preemptions=sum(one.num_preemptions for one in stats),
        num_repetitions=sum(one.num_repetitions for one in stats),
        num_scheduled_tokens=sum(one.num_scheduled_tokens for one in stats),
        num_spec_drafts=sum(one.num_spec_drafts for one in stats),
        num_spec_draft_tokens=sum(one.num_spec_draft_tokens for one in stats),
        num_spec_accepted_tokens=sum(one.num_spec_accepted_tokens for one in stats),
        num_spec_accepted_tokens_per_pos=[
            sum(counts) for counts in zip_longest(*(one.num_spec_accepted_tokens_per_pos for one in stats), fillvalue=0)
        ],
        step_seconds=max(one.step_seconds for one in stats),
        degradation="; ".join(one.degradation for one in stats if one.degradation),
        running_adapters=list(dict.fromkeys(name for one in stats for name in one.running_adapters)),
        waiting_adapters=list(dict.fromkeys(name for one in stats for name in one.waiting_adapters)),
    )


def limits_of(limits: Sequence[EngineReady]) -> EngineReady:
    """The limits of all replicas: the smallest `max_model_len`, the sums of `max_num_seqs` and `num_blocks`."""
    first = limits[0]
    return replace(
        first,
        max_model_len=min(ready.max_model_len for ready in limits),
        max_num_seqs=sum(ready.max_num_seqs for ready in limits),
        num_blocks=sum(ready.num_blocks for ready in limits),
        kv_equation=f"{len(limits)} replicas; {first.kv_equation}",
    )
