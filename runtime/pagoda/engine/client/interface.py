"""The engine as the server sees it: requests in, streams of outputs out, one health."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.request_queue import QueuePlaces
from pagoda.engine.health import EngineHealth
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineOutput, EngineReady, EngineStats, EngineTrace
from pagoda.parallel.rank_health import RankHealth
from pagoda.request import EngineRequest

TraceListener = Callable[[int, EngineTrace], None]
"""Called with the number of the replica, 0 where there is one engine, and what it has done."""


class EngineClient(ABC):
    """An engine that takes requests. Used from one event loop.

    `configured` is set once the first core was sent its configuration; `ready` holds the engine's limits once it has started.
    """

    def __init__(self, name: str = "engine") -> None:
        self.health = EngineHealth(name)
        self.configured = asyncio.Event()
        self.ready: EngineReady | None = None
        self.num_replays = 0  # times that a request went on in another engine
        self.sleep_level = 0  # 0: it is awake
        self.start_niceness = 0  # of the next start, which others then go before; not of restarts

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
        """Start the engine; returns when it is ready. Raises a `PagodaError` when the start fails.

        May be called again when the engine was unloaded or is dead.
        """

    @abstractmethod
    def configure(self, config: PagodaConfig) -> None:
        """Run with `config` from the next start on."""

    def use_process(self, process: PrelaunchedProcess) -> None:
        """Have the next core run in `process`, where that is possible; else it is ended."""
        process.close()

    @abstractmethod
    async def unload(self, cause: str) -> None:
        """End the engine's processes and give back their memory; what still runs gets `EngineDeadError`."""

    @abstractmethod
    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        """Places in the queue for a request of `count` sequences, all or none.

        Raises `EngineNotReadyError`, `EngineDeadError` or `QueueFullError`.
        """

    @abstractmethod
    def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        """Run a request; its outputs as they come, the last one with a `finish_reason`.

        `places`: of `reserve`, for one of the sequences that belong together; without, the queue may refuse it.
        `request_id` may be that of another request, running or not; outputs have the engine's own, which begins with it.
        Raises `EngineNotReadyError`, `EngineDeadError`, `QueueFullError` or `InvalidRequestError` in place of the first
        output, and `EngineDeadError` later if the engine fails. Closing the iterator aborts the request in the engine.
        """

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Let no request that is submitted from now on find what is cached. Raises `EngineNotReadyError` without an engine."""

    def trace(self, listener: TraceListener, *, kernels: bool = False) -> Callable[[], None]:
        """Call `listener` with what the engine does from now on, also after a restart; returns a function that ends it.

        Of an engine that records nothing nothing is heard. The engine records steps as long as there is a listener, and what
        runs within them as long as there is one for `kernels`.
        """
        del listener, kernels
        return lambda: None

    @abstractmethod
    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Use other settings from the next step on, all of them or none: fields of `SchedulerLimits`, and `log_level`.

        Raises `ConfigError` for one that may not be as it is asked, and `EngineNotReadyError` without an engine.
        """

    @abstractmethod
    async def sleep(self, level: int) -> None:
        """Give back the memory of weights and KV cache, with what is cached there; the processes stay.

        `level` 1 or 2, as in vLLM; with 2 the checkpoint's files are not kept in the page cache either. The engine must be
        idle. Raises `EngineNotReadyError` where it is not, and `EngineDeadError`.
        """

    @abstractmethod
    async def wake_up(self) -> None:
        """Return when the engine takes requests again; nothing to do where it is awake. Raises `EngineDeadError`."""

    @abstractmethod
    async def load_adapter(self, adapter: LoraAdapter) -> None:
        """Have an adapter read before there are requests for it. Raises `InvalidRequestError` where it cannot be, and
        `EngineNotReadyError` without an engine."""

    @abstractmethod
    def unload_adapter(self, adapter: LoraAdapter) -> None:
        """Free the memory of an adapter, once it has no requests. An engine that is not there has none."""

    @abstractmethod
    async def shutdown(self) -> None:
        """End the engine; what still runs gets `EngineDeadError`."""
