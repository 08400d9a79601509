"""Which of the served models are loaded: at start, on request of an administrator, or on demand of the first request.

    unloaded ──load, or a request──▶ loading ──▶ ready ──unload, idle, or to make room──▶ unloaded
                                        │      ▲ └──sleep, or idle──▶ sleeping: its process stays, its memory does not
                                        │      └──wake_up, or a request──┘
                                        └──▶ dead: says why; loaded again by `load`, or after a pause by a request

Each model is an engine of its own, so what one does is nothing to the others. As many are loaded as have a place and memory in
the budget; one that was loaded on demand gives way when it is idle, the one that was used longest ago first. Another version
of a loaded model takes over as `serving.versions` says.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from pagoda.config.models import changed
from pagoda.config.schema import PagodaConfig
from pagoda.config.values import format_bytes
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.process_client import SPARE_PROCESS_BYTES
from pagoda.engine.health import NOT_LOADED, EngineState
from pagoda.errors import (
    DeadlineExceededError,
    EngineNotReadyError,
    InvalidRequestError,
    ModelNotFoundError,
    NotSupportedError,
    PagodaError,
    QueueFullError,
    shown,
)
from pagoda.logs import model_name_var
from pagoda.platform.hardware import memory_report
from pagoda.process_control import LOADING_NICENESS
from pagoda.serving.adapters import AdapterManager
from pagoda.serving.health import ServerHealth
from pagoda.serving.loading import ModelLoader
from pagoda.serving.model_budget import FREE_SHARE, ModelBudget, ServerBudget, needed_memory, share_out, within_budget
from pagoda.serving.models import ModelRegistry, ServedModel
from pagoda.serving.text_layer import TextLayer
from pagoda.serving.versions import LOADING, Content, Strategy, VersionState, signature_of, until_unused

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""After a load failed, the model is not loaded on demand for so long."""
MIN_IDLE_SECONDS = 1.0
"""A model that a request has just been admitted to is not unloaded under it."""
LOOK_SECONDS = 1.0
SLEEP_LEVEL = 1
"""Of an engine that sleeps because it is idle."""


class ModelFactory(Protocol):
    """Makes what is served, each with an engine of its own."""

    def model(self, config: PagodaConfig) -> ServedModel:
        """A model that was not served before."""

    def version(self, before: ServedModel, config: PagodaConfig, version: str) -> ServedModel:
        """Another version of a model, with these settings."""


class _Entry:
    """A model, and what is known of its loads. `is_wanted`: it was loaded at start or by `load`, and must be there.

    `model` is the version that serves. `work`: what is being done to it, one thing at a time. `held`: memory of each version
    that has an engine, in bytes.
    """

    def __init__(self, model: ServedModel, model_names: Container[str]) -> None:
        self.model = model
        self.loader = ModelLoader(model, AdapterManager(model, model_names))
        self.settings = model.config
        self.content: Content | None = None  # that was loaded last
        self.num_versions = 1
        self.is_wanted = False
        self.held: dict[ServedModel, int] = {}
        self.work: asyncio.Task[None] | None = None
        self.is_unloading = False  # is what is being done
        self.is_interrupted = False  # by what is being done, for whose end requests wait
        self.waking: asyncio.Task[None] | None = None
        self.coming: VersionState | None = None
        self.failed: VersionState | None = None
        self.retiring: dict[ServedModel, asyncio.Task[None]] = {}
        self.num_waiting = 0
        self.used_at = 0.0
        self.failed_at: float | None = None
        model.health.versions = self.versions
        self.loader.adapters.report()

    @property
    def memory(self) -> dict[ServedModel, int]:
        """Of the versions that have an engine, or have been given the room for one, each one's in bytes."""
        is_gone = self.work is None and self.model.health.state in NOT_LOADED
        return {one: size for one, size in self.held.items() if one is not self.model or not is_gone}

    def others(self) -> list[VersionState]:
        """The versions beside the one that serves: one that is loading or was not loaded, and those that drain."""
        found = [one for one in (self.coming or self.failed,) if one is not None]
        draining = (f"{model.runner.num_running} requests run" for model in self.retiring)
        return found + [
            VersionState(model.version, "draining", cause) for model, cause in zip(self.retiring, draining, strict=True)
        ]

    def versions(self) -> list[dict[str, Any]]:
        """All versions as `/health` shows them."""
        health = self.model.health
        own = {"version": self.model.version, "state": str(health.state), "cause": health.cause}
        return [own, *(one._asdict() for one in self.others())]

    def next_version(self) -> str:
        """The name of a version that was not given any."""
        self.num_versions += 1
        return str(self.num_versions)


class ModelRepository:
    """The one place where models of a server are loaded and unloaded. For one event loop.

    `budget`: None where there is one model, which is loaded as long as the server runs. `factory`: None where no version can
    take the place of another, and no model can be added. `discover`: looks for models that are not served yet.
    """

    def __init__(
        self,
        models: ModelRegistry,
        budget: ServerBudget | None = None,
        *,
        factory: ModelFactory | None = None,
        load_on_demand: bool = False,
        idle_unload_seconds: float | None = None,
        spare_process_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._names = {name for model in models for name in model.names}
        self._entries = {model.name: _Entry(model, self._names) for model in models}
        # Of a model under whatever name it is asked for: what it is loaded into is its client.
        self._by_client = {id(entry.model.client): entry for entry in self._entries.values()}
        self._budget = budget
        self._factory = factory
        self._load_on_demand = load_on_demand
        self._idle_unload_seconds = idle_unload_seconds
        self._clock = clock
        self._spare_seconds = spare_process_seconds
        self._spare: PrelaunchedProcess | None = None  # for the engine of the next load on demand
        self._launching: asyncio.TimerHandle | None = None
        self._room = asyncio.Lock()  # who makes room does so alone
        self._idling: asyncio.Task[None] | None = None
        self._is_ending = False
        self.server_health: ServerHealth | None = None
        self.discover: Callable[[], Awaitable[None]] | None = None
        if budget is not None:
            for entry in self._entries.values():
                entry.model.client.health.unload("not loaded yet")

    def keep_process(self, process: PrelaunchedProcess) -> None:
        """Have the engine that is loaded next run in this process."""
        self._spare = process

    @property
    def adapters(self) -> list[AdapterManager]:
        """What says which adapters there are of each model."""
        return [entry.loader.adapters for entry in self._entries.values()]

    def adapters_of(self, model: ServedModel) -> AdapterManager:
        """That of the version of a model that serves."""
        return self._by_client[id(model.client)].loader.adapters

    def check_open(self) -> None:
        """Raise where no model could take a request, before a body is read that says for which model it is."""
        if self._budget is None:
            for entry in self._entries.values():
                if entry.waking is None and not entry.is_interrupted:
                    entry.model.health.check_ready()

    def check_settled(self, model: ServedModel) -> None:
        """Raise `EngineNotReadyError` while another version of the model loads: it would not have settings that change now."""
        if (coming := self._by_client[id(model.client)].coming) is not None:
            raise EngineNotReadyError(f"version {coming.version} of model {model.name!r} is loading; try again then")

    def must_be_there(self, name: str) -> bool:
        """Whether the server is not ready without the model."""
        return self._budget is None or (name in self._entries and self._entries[name].is_wanted)

    def other_versions(self, model: ServedModel) -> list[VersionState]:
        """The versions of the model that load, drain or were not loaded."""
        return self._by_client[id(model.client)].others()

    # ---- requests -------------------------------------------------------------------------------------------------

    async def ready(self, model: ServedModel, seconds: float | None = None) -> ServedModel:
        """The model once it takes requests, which may be another version then; `seconds`: how long the request may wait.

        Raises what `Health.check_ready` does where it will not, `DeadlineExceededError`, and `QueueFullError` where as many
        wait for it as `max_num_waiting` allows.
        """
        entry = self._by_client[id(model.client)]
        entry.used_at = self._clock()
        entry.model.health.check_admits()
        if model.client.health.accepts_requests:
            return model
        if self._awaited(entry) is None:
            entry.model.health.check_ready()
            return self._current(entry, model)
        if entry.num_waiting >= entry.model.config.max_num_waiting:
            raise QueueFullError(f"{entry.num_waiting} requests wait until model {model.name!r} takes requests", 5)
        entry.num_waiting += 1
        try:
            await self._until_ready(entry, seconds)
        finally:
            entry.num_waiting -= 1
            entry.used_at = self._clock()
        return self._current(entry, model)

    async def _until_ready(self, entry: _Entry, seconds: float | None) -> None:
        name = entry.model.name
        limits = [one for one in (seconds, entry.model.config.request_timeout_seconds) if one is not None]
        deadline = self._clock() + min(limits) if limits else None
        while (awaited := self._awaited(entry)) is not None:
            done, _ = await asyncio.wait((awaited,), timeout=None if deadline is None else deadline - self._clock())
            if not done:
                raise DeadlineExceededError(f"model {name!r} took no requests before this one's deadline")
            if entry.model.client.health.accepts_requests:
                return
            if not awaited.cancelled() and (error := awaited.exception()) is not None:
                raise EngineNotReadyError(f"model {name!r} was not loaded: {error}")
        entry.model.health.check_ready()

    def _awaited(self, entry: _Entry) -> asyncio.Task[None] | None:
        """What makes the model take requests when it is done, begun where it may be; None where nothing does."""
        if entry.waking is not None:
            return entry.waking
        state = entry.model.health.state
        serves_on = entry.coming is not None and not entry.is_interrupted
        if entry.work is not None and not serves_on:
            return None if entry.is_unloading and not self._load_on_demand else entry.work
        if state is EngineState.SLEEPING and entry.model.config.wake_on_request:
            return self._wake(entry)
        return self._begin_load(entry, entry.settings) if self._may_load(entry) else None

    @staticmethod
    def _current(entry: _Entry, model: ServedModel) -> ServedModel:
        """The version that serves of the model or adapter that a request asked for."""
        if model.adapter is None:
            return entry.model
        served = entry.model.adapters.get(model.name)
        if served is None:
            raise ModelNotFoundError(f"adapter {shown(model.name)} is not served here")
        return served

    def _may_load(self, entry: _Entry) -> bool:
        if self._budget is None or not self._load_on_demand or self._is_ending:
            return False
        state = entry.model.health.state
        if state is EngineState.DEAD:
            return entry.failed_at is None or self._clock() - entry.failed_at >= RETRY_SECONDS
        return state is EngineState.UNLOADED

    # ---- administration -------------------------------------------------------------------------------------------

    async def start(self, names: Iterable[str]) -> None:
        """Load these models, which must be there from now on. One that is not loaded says so in its own health."""
        loads = []
        for name in names:
            self._entries[name].is_wanted = True
            loads.append(self._begin_load(self._entries[name], self._entries[name].settings))
        self._changed()
        self._watch_idle()
        await asyncio.gather(*loads, return_exceptions=True)

    async def start_only(self, starting: Awaitable[None]) -> None:
        """Load the only model, whose engine is `starting`. Raises why it is not loaded."""
        (entry,) = self._entries.values()
        entry.content = Content(entry.settings, await asyncio.to_thread(signature_of, entry.settings))
        await entry.loader.load(starting)
        self._watch_idle()

    async def load(
        self,
        model: ServedModel,
        changes: Mapping[str, Any] | None = None,
        *,
        version: str | None = None,
        strategy: Strategy = Strategy.ROLLING_UPDATE,
    ) -> ServedModel:
        """The model, once it is loaded, which it must be from now on. Raises why it is not.

        `changes`: settings for as long as it is loaded, in place of those of its entry, the checkpoint among them. Where the
        model is loaded with others, or its files have changed since, another version takes its place, by `strategy`; one that
        cannot leaves the one before as it was. `version`: the name of what is loaded. Raises `ConfigError` for what `changes`
        may not be.
        """
        entry = self._by_client[id(model.client)]
        config = entry.settings
        if changes:
            config = changed(config, changes, lambda info: "is the server's" if info.is_of_server else None)
            if config.model_aliases != entry.settings.model_aliases:
                raise InvalidRequestError("model_aliases: every version of a model has the same", "parameters")
        if self._budget is not None:
            entry.is_wanted = True
            self._changed()
        content = await self._settled(entry, config)
        if entry.content is not None and not changes:  # what it was loaded with last time it keeps while it is loaded
            is_loaded = entry.model.health.state not in NOT_LOADED
            content = content._replace(config=entry.content.config) if is_loaded else content
        if entry.model.client.health.is_loading and entry.model.health.state is EngineState.STARTING:
            entry.model.health.check_engine()
        entry.used_at = self._clock()
        if entry.model.health.state in NOT_LOADED and self._budget is not None:
            await self._finished(entry, self._begin_load(entry, content.config, version))
        elif version not in (None, entry.model.version) or (entry.content is not None and content != entry.content):
            await self._finished(entry, self._begin_replacing(entry, content, version, strategy))
        elif entry.model.health.state is EngineState.SLEEPING:
            await self.wake_up(entry.model)
        entry.model.health.check_engine()
        return entry.model

    async def _settled(self, entry: _Entry, config: PagodaConfig) -> Content:
        """What is to be loaded, once nothing else is being done to the model."""
        while True:
            if entry.work is not None:
                await asyncio.wait((entry.work,))
            signature = await asyncio.to_thread(signature_of, config)
            if entry.work is None:
                return Content(config, signature)

    @staticmethod
    async def _finished(entry: _Entry, work: asyncio.Task[None]) -> None:
        """Return when the work is done, or raise why it is not; who waits may leave."""
        await asyncio.wait((work,))
        if work.cancelled():
            raise EngineNotReadyError(f"model {entry.model.name!r} was unloaded meanwhile")
        work.result()

    async def unload(self, model: ServedModel) -> None:
        """Return when the model is unloaded; running requests have `grace_period_seconds`.

        Raises `NotSupportedError` for the only model of a server.
        """
        if self._budget is None:
            raise NotSupportedError(
                f"model {model.name!r} cannot be unloaded while the server runs; stop the server instead"
            )
        entry = self._by_client[id(model.client)]
        entry.is_wanted = False
        self._changed()
        while entry.work is not None:
            if not entry.is_unloading:
                entry.work.cancel()
            await asyncio.wait((entry.work,))
        if entry.model.health.state is not EngineState.UNLOADED:
            await self._finished(entry, self._begin_unload(entry, "unloaded on request"))

    # ---- which models there are ----------------------------------------------------------------------------------

    async def find(self, name: str) -> ServedModel:
        """The model of that name, looked for where models are found if none has it. Raises `ModelNotFoundError`."""
        try:
            return self._models.find(name)
        except ModelNotFoundError:
            if self.discover is None:
                raise
            await self.discover()
            return self._models.find(name)

    def resize(self, config: PagodaConfig, models: Mapping[str, PagodaConfig]) -> None:
        """Share out the same memory among these models, for loads from now on. Raises `ConfigError` where they do not fit."""
        assert self._budget is not None
        self._budget = share_out(replace(config, models_memory_bytes=self._budget.memory), models)

    async def add(self, config: PagodaConfig, *, load: bool) -> None:
        """Serve one more; `load`: now, and then it must be there. Raises why it is not loaded; it is served all the same."""
        assert self._factory is not None
        model = self._factory.model(config)
        self._names.update(model.names)
        entry = self._entries[model.name] = _Entry(model, self._names)
        self._by_client[id(model.client)] = entry
        model.client.health.unload("not loaded yet")
        self._models.add(model)
        if self.server_health is not None:
            self.server_health.add(model.name, model.health)
        logger.info("model %r is served from now on", model.name)
        if load:
            await self._finished(entry, self._begin_load(entry, entry.settings))
            entry.is_wanted = True
            self._changed()

    async def remove(self, name: str) -> None:
        """Serve one less, when its running requests have ended."""
        entry = self._entries[name]
        await self.unload(entry.model)
        del self._entries[name]
        self._names.difference_update(entry.model.names)
        self._models.remove(entry.model)
        entry.model.metrics.unwatch()
        if self.server_health is not None:
            self.server_health.remove(name)
        await entry.loader.shutdown()
        self._by_client.pop(id(entry.model.client), None)
        logger.info("model %r is served no longer", name)

    async def redefine(self, name: str, config: PagodaConfig) -> None:
        """The settings of a model are others: another version with them takes over, where it is loaded. Raises why not."""
        entry = self._entries[name]
        content = await self._settled(entry, config)
        if entry.model.health.state not in NOT_LOADED and content != entry.content:
            await self._finished(entry, self._begin_replacing(entry, content, None, Strategy.ROLLING_UPDATE))
        elif entry.model.health.state in NOT_LOADED:
            entry.model.configure(config)
        entry.settings = config

    def _changed(self) -> None:
        if self.server_health is not None:
            self.server_health.changed()

    async def shutdown(self) -> None:
        """End all models."""
        await self.stop_watching()
        await asyncio.gather(*(entry.loader.shutdown() for entry in self._entries.values()))
        if self._launching is not None:
            self._launching.cancel()
        if self._spare is not None:
            self._spare.close()

    async def stop_watching(self) -> None:
        """Load, wake and put to rest no model any more, and end versions that others have taken the place of."""
        self._is_ending = True
        await asyncio.sleep(0)  # a task that ends before it begins would not end what it is for
        entries = self._entries.values()
        tasks = [task for one in entries for task in (one.work, one.waking, *one.retiring.values()) if task is not None]
        if self._idling is not None:
            tasks.append(self._idling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def end_text_layers(self) -> None:
        """End what was loaded beside the engines."""
        await asyncio.gather(*(entry.loader.end_text() for entry in self._entries.values()))

    # ---- loads ----------------------------------------------------------------------------------------------------

    def _begin(self, entry: _Entry, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Have `work` done to the model, as the only one."""
        assert entry.work is None

        async def run() -> None:
            try:
                await work
            finally:
                entry.work, entry.is_unloading = None, False
                entry.used_at = self._clock()

        # In a context of its own: what it starts lives on, and its log lines are not those of the request that asked for it.
        own = contextvars.Context()
        own.run(model_name_var.set, entry.model.name)
        entry.work = asyncio.create_task(run(), name=f"{what}-{entry.model.name}", context=own)
        # Waited for or not; and one that was cancelled before it began has not ended itself.
        entry.work.add_done_callback(lambda task: self._ended(entry, task, work))
        return entry.work

    @staticmethod
    def _ended(entry: _Entry, task: asyncio.Task[None], work: Coroutine[Any, Any, None]) -> None:
        work.close()
        if entry.work is task:
            entry.work, entry.is_unloading = None, False
        if not task.cancelled():
            task.exception()

    def _begin_unload(self, entry: _Entry, cause: str) -> asyncio.Task[None]:
        entry.is_unloading = True
        return self._begin(entry, self._unload(entry, cause), "unload")

    def _begin_load(self, entry: _Entry, config: PagodaConfig, version: str | None = None) -> asyncio.Task[None]:
        return entry.work or self._begin(entry, self._load(entry, config, version), "load")

    async def _load(self, entry: _Entry, config: PagodaConfig, version: str | None = None) -> None:
        model, budget = entry.model, self._budget
        assert budget is not None
        try:
            content = Content(config, await asyncio.to_thread(signature_of, config))
            async with self._room:
                own = budget.models[model.name]
                if config != entry.settings:
                    own = budget.of_version(model.name, config, budget.memory)
                entry.held.pop(model, None)
                await self._make_room(entry, own.memory, f"model {model.name!r}")
                entry.held[model] = own.memory
                model.configure(within_budget(config, own))
                self._prepare_start(model)
            await entry.loader.load()
            if version is not None:
                model.version = version
            elif entry.content not in (None, content):
                model.version = entry.next_version()
            entry.content, entry.failed_at, entry.failed = content, None, None
            self._launch_spare()
        except Exception as error:  # raised on; any error of a load is the reason that the model shows
            entry.failed_at = self._clock()
            entry.held.pop(model, None)
            if model.health.state is EngineState.UNLOADED:
                model.client.health.cause = str(error)
            raise

    def _prepare_start(self, model: ServedModel) -> None:
        if any(one.client.health.accepts_requests for one in self._models):
            model.client.start_niceness = LOADING_NICENESS
        if self._spare is not None:
            model.client.use_process(self._spare)
            self._spare = None

    # ---- versions -------------------------------------------------------------------------------------------------

    def _begin_replacing(
        self, entry: _Entry, content: Content, version: str | None, strategy: Strategy
    ) -> asyncio.Task[None]:
        if self._factory is None:
            raise NotSupportedError("this server cannot load another version of its model; restart it")
        if version is None:
            version = entry.next_version()
        elif any(version == model.version for model in (entry.model, *entry.retiring)):
            raise InvalidRequestError(
                f"model {entry.model.name!r} has a version {shown(version)} already", "parameters"
            )
        elif version.isdecimal():
            entry.num_versions = max(entry.num_versions, int(version))
        return self._begin(entry, self._replace(entry, content, version, strategy), "replace")

    async def _replace(self, entry: _Entry, content: Content, version: str, strategy: Strategy) -> None:
        before = entry.model
        entry.coming, entry.failed = VersionState(version, LOADING, ""), None
        try:
            if strategy is Strategy.RECREATE:
                entry.is_interrupted = True
                await self._end(entry, f"version {version} takes its place")
            await self._take_over(entry, content, version)
        except Exception as error:  # raised on; the version before serves as it did
            cause = str(error) if isinstance(error, PagodaError) else f"{type(error).__name__}: {error}"
            logger.error("version %s of model %r was not loaded: %s", version, before.name, cause)
            entry.coming, entry.failed = None, VersionState(version, "dead", cause)
            if strategy is Strategy.RECREATE:
                entry.held[before] = before.config.engine_memory_bytes or 0
                await entry.loader.load()
            raise
        finally:
            entry.coming, entry.is_interrupted = None, False

    async def _take_over(self, entry: _Entry, content: Content, version: str) -> None:
        """Load a version in an engine of its own, and have it serve in place of the one before. Raises why it does not."""
        before, before_loader = entry.model, entry.loader
        what = f"version {version} of model {before.name!r}"
        assert self._factory is not None
        async with self._room:
            config = await self._room_beside(entry, content.config, what)
            model = self._factory.version(before, config, version)
            entry.held[model] = config.engine_memory_bytes or 0
            self._prepare_start(model)
        loader = ModelLoader(model, AdapterManager(model, self._names))
        try:
            await loader.load()
            await loader.adapters.take_over(before_loader.adapters)
        except BaseException:  # raised on, when nothing is left of it
            await loader.shutdown()
            del entry.held[model]
            raise
        # Nothing waits from here: a request finds either the version before, and stays with it, or this one.
        entry.model, entry.loader, entry.content = model, loader, content
        self._by_client[id(model.client)] = entry
        model.take_over(before)
        loader.adapters.report()
        self._models.replace(before, model)
        entry.retiring[before] = asyncio.create_task(
            self._retire(entry, before, before_loader), name=f"retire-{before.name}"
        )
        logger.info("%s serves; version %s has %d requests", what, before.version, before.runner.num_running)
        self._changed()

    async def _retire(self, entry: _Entry, model: ServedModel, loader: ModelLoader) -> None:
        """End a version that another one has taken the place of, when its last request has ended."""
        try:
            if model.health.state not in (*NOT_LOADED, EngineState.SLEEPING):
                await until_unused(model, loader.text)
        finally:
            await loader.shutdown()
            self._models.retired(model)
            entry.held.pop(model, None)
            entry.retiring.pop(model, None)
            self._by_client.pop(id(model.client), None)
        logger.info("version %s of model %r has ended", model.version, model.name)

    # ---- room -----------------------------------------------------------------------------------------------------

    async def _make_room(self, entry: _Entry, need: int, what: str) -> None:
        """Unload idle models until there are a place and `need` bytes for another engine; wait for one that is busy or drains.

        Raises `EngineNotReadyError` where those that must be there take all.
        """
        budget = self._budget
        assert budget is not None
        while True:
            holders = {name: one.memory for name, one in self._entries.items()}
            used = sum(sum(held.values()) for held in holders.values())
            places = sum(len(held) for held in holders.values())
            if places < budget.places and used + need <= budget.memory:
                return
            others = [one for one in self._entries.values() if one is not entry and holders[one.model.name]]
            may_go = [one for one in others if not one.is_wanted]
            is_draining = any(one.retiring for one in self._entries.values())
            if not may_go and not is_draining:
                raise EngineNotReadyError(
                    f"there is no room for {what}: it needs {format_bytes(need)} of models_memory_bytes="
                    f"{format_bytes(budget.memory)}, of which {format_bytes(budget.memory - used)} are free, and "
                    f"{places} of {budget.places} places (max_loaded_models) are taken by "
                    f"{', '.join(name for name, held in holders.items() if held)}; unload one of them, or raise these"
                )
            idle = [one for one in may_go if self._is_idle(one, MIN_IDLE_SECONDS)]
            if not idle:
                await asyncio.sleep(MIN_IDLE_SECONDS / 4)
                continue
            oldest = min(idle, key=lambda one: one.used_at)
            await asyncio.shield(self._begin_unload(oldest, f"to make room for {what}"))

    async def _room_beside(self, entry: _Entry, config: PagodaConfig, what: str) -> PagodaConfig:
        """The settings of another version with the part of the machine that it gets beside the one that serves.

        Raises `EngineNotReadyError` where both do not fit.
        """
        try:
            if self._budget is not None:
                used = sum(sum(one.memory.values()) for one in self._entries.values())
                own: ModelBudget = self._budget.of_version(entry.model.name, config, self._budget.memory - used)
                await self._make_room(entry, own.memory, what)
                return within_budget(config, own)
            need, free = needed_memory(config), int(FREE_SHARE * memory_report().available)
            if need > free:
                raise EngineNotReadyError(
                    f"there is no room for {what}: it needs {format_bytes(need)}, and {format_bytes(free)} are free"
                )
            return config
        except EngineNotReadyError as error:
            raise EngineNotReadyError(
                f"{error}. With strategy Recreate version {entry.model.version} is ended first"
            ) from None

    def _launch_spare(self) -> None:
        """Have a process for the next load launched later: imports are most of a load."""
        if self._spare_seconds is not None and self._load_on_demand and self._launching is None and self._spare is None:
            self._launching = asyncio.get_running_loop().call_later(self._spare_seconds, self._launch)

    def _launch(self) -> None:
        self._launching = None
        all_loaded = all(entry.memory for entry in self._entries.values())
        if not self._is_ending and not all_loaded and memory_report().available >= SPARE_PROCESS_BYTES:
            with suppress(OSError):
                self._spare = PrelaunchedProcess(niceness=LOADING_NICENESS)

    def _is_idle(self, entry: _Entry, seconds: float) -> bool:
        model = entry.model
        if entry.work is not None or entry.retiring or model.runner.num_running or not model.health.is_ready:
            return False
        return self._clock() - max(entry.used_at, model.runner.last_end) >= seconds

    async def _unload(self, entry: _Entry, cause: str) -> None:
        await self._end(entry, cause)
        entry.failed = None
        self._launch_spare()
        logger.info("model %r is unloaded: %s", entry.model.name, cause)

    async def _end(self, entry: _Entry, cause: str) -> None:
        """End the model's engine, and those of versions before; running requests have `grace_period_seconds`."""
        model = entry.model
        if model.client.health.accepts_requests:
            model.health.unloading()
        try:
            async with asyncio.timeout(model.config.grace_period_seconds):
                await asyncio.gather(*(one.runner.wait_until_idle() for one in (model, *entry.retiring)))
        except TimeoutError:
            logger.warning("model %r: %d requests did not finish in time", model.name, model.runner.num_running)
        retiring = list(entry.retiring.values())
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        await entry.loader.unload(cause)
        entry.held.pop(model, None)

    def _watch_idle(self) -> None:
        """Have idle models sleep, or be unloaded, after their times; without any time there is nothing to watch."""
        if self._idling is None and self._idle_times() and not self._is_ending:
            self._idling = asyncio.create_task(self._look(), name="idle-models")

    def _idle_times(self) -> list[float]:
        times = [one.model.config.idle_sleep_seconds for one in self._entries.values()]
        return [one for one in (*times, self._idle_unload_seconds) if one is not None]

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(min((LOOK_SECONDS, *(seconds / 4 for seconds in self._idle_times()))))
            for entry in list(self._entries.values()):
                try:
                    await self._end_idle(entry)
                except Exception:  # whatever it is, the others are looked after all the same
                    logger.exception("model %r could not be put to rest", entry.model.name)

    async def _end_idle(self, entry: _Entry) -> None:
        unload_after = None if entry.is_wanted or self._budget is None else self._idle_unload_seconds
        if unload_after is not None and self._is_idle(entry, unload_after):
            async with self._room:
                if self._is_idle(entry, unload_after):
                    await asyncio.shield(self._begin_unload(entry, f"it had no request for {unload_after:g} s"))
            return
        sleep_after = entry.model.config.idle_sleep_seconds
        if sleep_after is not None and entry.model.client.health.accepts_requests and self._is_idle(entry, sleep_after):
            await entry.model.client.sleep(SLEEP_LEVEL)

    def reconfigured(self, model: ServedModel, text: TextLayer | None) -> None:
        """The model's settings are others, for its next loads, too; `text`: the text layer of its requests from now on."""
        entry = self._by_client[id(model.client)]
        if entry.content is not None:
            entry.content = entry.content._replace(config=_unplaced(model.config, entry.content.config))
        entry.settings = _unplaced(model.config, entry.settings)
        if text is not None:
            entry.loader.replace_text(text)
        self._watch_idle()

    # ---- sleep ----------------------------------------------------------------------------------------------------

    async def sleep(self, model: ServedModel, level: int) -> None:
        """Return when the model's engine has given back its memory; running requests have `grace_period_seconds` to end.

        Raises `EngineNotReadyError` where they do not.
        """
        if model.health.state is EngineState.SLEEPING:
            return
        model.health.check_engine()
        try:
            async with asyncio.timeout(model.config.grace_period_seconds):
                await model.runner.wait_until_idle()
        except TimeoutError:
            raise EngineNotReadyError(
                f"{model.runner.num_running} requests are running: an engine sleeps when it is idle"
            ) from None
        await model.client.sleep(level)

    async def wake_up(self, model: ServedModel) -> None:
        """Return when the model's engine takes requests again. Raises why it does not."""
        entry = self._by_client[id(model.client)]
        if model.health.state is EngineState.SLEEPING or entry.waking is not None:
            await asyncio.shield(entry.waking or self._wake(entry))
        entry.used_at = self._clock()
        model.health.check_engine()

    def _wake(self, entry: _Entry) -> asyncio.Task[None]:
        async def wake() -> None:
            started = self._clock()
            try:
                await entry.model.client.wake_up()
                logger.info("model %r is awake after %.2f s", entry.model.name, self._clock() - started)
            finally:
                entry.waking = None
                entry.used_at = self._clock()

        entry.waking = asyncio.create_task(wake(), name=f"wake-{entry.model.name}")
        entry.waking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return entry.waking


def _unplaced(config: PagodaConfig, own: PagodaConfig) -> PagodaConfig:
    """`config` without the part of the machine that it was given, but as `own` has it."""
    return replace(
        config,
        threads=own.threads,
        engine_memory_bytes=own.engine_memory_bytes,
        gpu_memory_utilization=own.gpu_memory_utilization,
    )
