"""Health as every protocol reports it: REST probes, gRPC health, V2 readiness and repository index, `/health`, metrics.

There is one state machine, the engine's (`engine.health`). The server adds what only it knows: that its tokenizers must be up
before it accepts requests, that it is draining, that it has failed. Ready and live are different questions: a server that
loads, restarts its engine or drains is live and not ready. With one model the server's health is the model's; with several
(`ServerHealth`) the server is ready while those are that must be there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from pagoda.engine.health import SERVING, EngineState
from pagoda.errors import EngineDeadError, EngineNotReadyError

if TYPE_CHECKING:
    from pagoda.engine.client.interface import EngineClient

Listener = Callable[[], None]

TOKENIZER_PHASE = "tokenizer"
DRAINED = "the setting drain is on"


class Health(ABC):
    """The state of the server or of a model, as probes and clients are told it."""

    @property
    @abstractmethod
    def state(self) -> EngineState:
        """The state as of now."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether a request sent now would be accepted."""

    @property
    def is_live(self) -> bool:
        """Whether it can still become ready; if not, the server's process should be restarted."""
        return self.state is not EngineState.DEAD

    @property
    @abstractmethod
    def phase(self) -> str:
        """The start-up phase while it starts, else the state; for people."""

    @property
    @abstractmethod
    def detail(self) -> str:
        """What the start-up phase says of itself, such as `40 %`."""

    @property
    @abstractmethod
    def cause(self) -> str | None:
        """Why it is in its state."""

    @abstractmethod
    def check_ready(self) -> None:
        """Raise `EngineNotReadyError` or `EngineDeadError`, with the reason, where a request would not be accepted."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Of `snapshot`, what a probe needs and everybody may know."""

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """The body of `/health`: plain values."""

    @abstractmethod
    def drain(self, cause: str) -> None:
        """Refuse new requests from now on; running ones continue."""

    @abstractmethod
    def fail(self, cause: str) -> None:
        """It has failed for good, whatever the engine's own state."""

    @abstractmethod
    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener()` after each change of state or phase; returns what ends the subscription."""


class ModelHealth(Health):
    """Of one model: its engine's state machine, and the server's own transitions of it.

    Not ready before `text_is_ready` was called.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self.is_unloading = False  # the model drains, and not the server
        self.wakes_on_request = False
        self.versions: Callable[[], list[dict[str, Any]]] = list
        self._listeners: list[Listener] = []
        self._unfollow = engine.health.subscribe(self._changed)
        engine.health.hold(TOKENIZER_PHASE)

    def follow(self, engine: EngineClient) -> None:
        """Be the health of `engine` from now on, which is another version's."""
        self._unfollow()
        self._engine = engine
        self._unfollow = engine.health.subscribe(self._changed)
        self._changed()

    def _changed(self) -> None:
        for listener in list(self._listeners):
            listener()

    @property
    @override
    def state(self) -> EngineState:
        return self._engine.health.shown_state

    @property
    def is_drained(self) -> bool:
        """Whether the setting `drain` is on."""
        return self._engine.health.is_drained

    @property
    @override
    def is_ready(self) -> bool:
        health = self._engine.health
        if health.is_drained:
            return False
        return health.accepts_requests or (health.state is EngineState.SLEEPING and self.wakes_on_request)

    @property
    @override
    def phase(self) -> str:
        return self._engine.health.phase

    @property
    @override
    def detail(self) -> str:
        return self._engine.health.detail

    @property
    @override
    def cause(self) -> str | None:
        health = self._engine.health
        return DRAINED if health.is_drained and health.state in SERVING else health.cause

    def check_admits(self) -> None:
        """Raise `EngineNotReadyError` where the model is drained, whatever its engine could do."""
        if self.is_drained:
            raise EngineNotReadyError(f"the model takes no requests ({DRAINED}); send the request to another replica")

    @override
    def check_ready(self) -> None:
        self.check_engine()
        self.check_admits()

    def check_engine(self) -> None:
        """Raise as `check_ready` does where the engine would not take a request, drained or not."""
        state = self._engine.health.state
        if state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.cause or 'unknown cause'}")
        if state is EngineState.STARTING:
            doing = "model is loading" if self._engine.health.is_loading else "engine is restarting"
            raise EngineNotReadyError(f"the {doing} (stage: {self.phase})")
        if state is EngineState.DRAINING:
            what = "model is being unloaded" if self.is_unloading else "server is shutting down"
            raise EngineNotReadyError(f"the {what}; send the request to another replica")
        if state is EngineState.UNLOADED:
            raise EngineNotReadyError("the model is not loaded")
        if state is EngineState.SLEEPING and not self.wakes_on_request:
            raise EngineNotReadyError("the engine is asleep; /wake_up wakes it")

    @override
    def summary(self) -> dict[str, Any]:
        health = self._engine.health
        return {"state": str(health.shown_state), "started": health.has_started, "stage": health.phase}

    @override
    def snapshot(self) -> dict[str, Any]:
        """The body of `/health`: plain values. `since` is when the state began, in seconds since the epoch.

        `started` is true from the first time the server was ready, so a startup probe that has seen it succeeds for good.
        `step` counts the engine's steps since its core started; `seconds_since_progress` is the age of its last heartbeat.
        Both are None while there is no core. `ranks`: with more than one process to a model, each of them; `replicas`: with
        more than one engine, each of them. `versions`: that which serves, and those that come, go, or were not loaded.
        """
        now = time.monotonic()
        health, stats, progress = self._engine.health, self._engine.stats, self._engine.heartbeat
        is_up = progress is not None and progress.is_up
        return {
            "state": str(health.shown_state),
            "started": health.has_started,
            "stage": health.phase,
            "detail": health.detail,
            "since": health.since,
            "cause": self.cause,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "step": progress.step if progress is not None and is_up else None,
            "seconds_since_progress": now - progress.time if progress is not None and is_up else None,
            "versions": self.versions(),
            "ranks": [
                {
                    "rank": rank.rank,
                    "host": rank.host,
                    "pid": rank.pid,
                    "up": rank.is_up,
                    "step": rank.num_steps,
                    "seconds_since_heartbeat": now - rank.last_heartbeat,
                }
                for rank in self._engine.ranks
            ],
            "replicas": [
                {
                    "replica": index,
                    "state": str(replica.health.state),
                    "stage": replica.health.phase,
                    "cause": replica.health.cause,
                    "since": replica.health.since,
                    "running": replica.stats.num_running,
                    "waiting": replica.stats.num_waiting,
                    "kv_cache_usage": replica.stats.kv_cache_usage,
                }
                for index, replica in enumerate(self._engine.replicas)
            ],
        }

    def text_is_ready(self) -> None:
        """The tokenizers are up."""
        self._engine.health.release(TOKENIZER_PHASE)

    def text_is_gone(self) -> None:
        """The tokenizers were ended: not ready before they are up again."""
        self._engine.health.hold(TOKENIZER_PHASE)

    def unloading(self) -> None:
        """Refuse new requests, for the model is about to be unloaded."""
        self.is_unloading = True
        self.drain("the model is being unloaded")

    @override
    def drain(self, cause: str) -> None:
        if self._engine.health.state not in (EngineState.DRAINING, EngineState.DEAD, EngineState.UNLOADED):
            self._engine.health.transition(EngineState.DRAINING, cause)

    @override
    def fail(self, cause: str) -> None:
        self._engine.health.transition(EngineState.DEAD, cause)

    @override
    def subscribe(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


class ServerHealth(Health):
    """Of a server of several models: ready while each of those is that must be there, dead when all are. One that has no model
    yet is ready: none must be there.

    `required` says whether a model must be there. What another model does shows in its own health only.
    """

    def __init__(self, models: Iterable[tuple[str, ModelHealth]], required: Callable[[str], bool]) -> None:
        self._models = dict(models)
        self._required = required
        self._unsubscribe = {name: health.subscribe(self.changed) for name, health in self._models.items()}
        self._since = time.time()
        self._drained: str | None = None
        self._failed: str | None = None
        self._listeners: list[Listener] = []
        self._has_started = False

    @property
    @override
    def state(self) -> EngineState:
        models = self._models.values()
        if self._failed is not None or (models and all(health.state is EngineState.DEAD for health in models)):
            return EngineState.DEAD
        missing = self._missing()
        if self._drained is not None or (models and all(health.is_drained for health in models)):
            return EngineState.DRAINING
        if missing:
            return (
                EngineState.DRAINING if all(self._models[name].is_drained for name in missing) else EngineState.STARTING
            )
        states = {health.state for health in models}
        if states <= {EngineState.SLEEPING, EngineState.UNLOADED} and EngineState.SLEEPING in states:
            return EngineState.SLEEPING
        return EngineState.DEGRADED if EngineState.DEGRADED in states else EngineState.READY

    @property
    @override
    def is_ready(self) -> bool:
        return self.state in (*SERVING, EngineState.SLEEPING)

    @property
    @override
    def phase(self) -> str:
        missing = self._missing()
        if self.state is not EngineState.STARTING or not missing:
            return self.state.value
        return f"{missing[0]}: {self._models[missing[0]].phase}"

    @property
    @override
    def detail(self) -> str:
        missing = self._missing()
        return self._models[missing[0]].detail if missing else ""

    @property
    @override
    def cause(self) -> str | None:
        if self._failed is not None or self._drained is not None:
            return self._failed or self._drained
        missing = self._missing()
        if not missing:
            return DRAINED if self.state is EngineState.DRAINING else None
        return "; ".join(f"{name} is {self._models[name].state}" for name in missing)

    @override
    def check_ready(self) -> None:
        state = self.state
        if state is EngineState.DEAD:
            raise EngineDeadError(f"the server is dead: {self._failed or 'no model is left'}")
        if state is EngineState.DRAINING:
            what = "is shutting down" if self._drained is not None else f"takes no requests ({DRAINED})"
            raise EngineNotReadyError(f"the server {what}; send the request to another replica")
        if state is EngineState.STARTING:
            raise EngineNotReadyError(f"models are loading (stage: {self.phase})")

    @override
    def summary(self) -> dict[str, Any]:
        return {"state": str(self.state), "started": self._has_started, "stage": self.phase}

    @override
    def snapshot(self) -> dict[str, Any]:
        """Of all models together, and `models`: each by its name as the server of one model would say it."""
        models = {name: health.snapshot() for name, health in self._models.items()}
        return {
            **self.summary(),
            "detail": self.detail,
            "since": self._since,
            "cause": self.cause,
            "running": sum(one["running"] for one in models.values()),
            "waiting": sum(one["waiting"] for one in models.values()),
            "kv_cache_usage": max((one["kv_cache_usage"] for one in models.values()), default=0.0),
            "step": None,
            "seconds_since_progress": None,
            "models": [{"name": name, "required": self._required(name), **one} for name, one in models.items()],
        }

    def add(self, name: str, health: ModelHealth) -> None:
        """A model is served that was not before."""
        self._models[name] = health
        self._unsubscribe[name] = health.subscribe(self.changed)
        self.changed()

    def remove(self, name: str) -> None:
        """A model is served no longer."""
        del self._models[name]
        self._unsubscribe.pop(name)()
        self.changed()

    def changed(self) -> None:
        """A model has changed, or which of them must be there."""
        self._has_started = self._has_started or self.is_ready
        for listener in list(self._listeners):
            listener()

    @override
    def drain(self, cause: str) -> None:
        self._drained = cause
        for health in self._models.values():
            health.drain(cause)
        self.changed()

    @override
    def fail(self, cause: str) -> None:
        self._failed = cause
        for health in self._models.values():
            health.fail(cause)
        self.changed()

    @override
    def subscribe(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _missing(self) -> list[str]:
        """Models that must be there and are not ready."""
        return [name for name, health in self._models.items() if self._required(name) and not health.is_ready]
