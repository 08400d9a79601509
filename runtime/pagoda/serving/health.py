"""The one truth about health that every door shows: REST probes, KServe's data plane, gRPC health and `/health`.

It joins what the engine says of itself with what only the server knows: that the tokenizers are up, and that the server is
going away. Ready and live are different questions: a server that loads or drains is live and not ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

from pagoda.engine.messages import EngineStats
from pagoda.errors import EngineDeadError, EngineNotReadyError

Listener = Callable[[], None]


class State(StrEnum):
    """What the server can do for a client. `DEGRADED` serves, with less than it should have."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    DEAD = "dead"


class EngineHealthLike(Protocol):
    """What is read of `pagoda.engine.health.EngineHealth`."""

    @property
    def state(self) -> str:
        """One of `State`'s values."""

    @property
    def stage(self) -> str:
        """The start-up stage, for people."""

    @property
    def cause(self) -> str | None:
        """Why the engine is degraded or dead."""


class EngineLike(Protocol):
    """What is read of `pagoda.engine.client.EngineClient`."""

    @property
    def health(self) -> EngineHealthLike:
        """The engine's own state."""

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its last step."""


class ServerHealth:
    """State of the whole server, and its changes.

    `engine_changed()` is to be called whenever the engine's health may have changed; listeners hear of changes of state only.
    """

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._is_text_ready = False
        self._is_draining = False
        self._failure: str | None = None
        self._listeners: list[Listener] = []
        self._state = State.STARTING
        self._since = time.time()

    @property
    def state(self) -> State:
        """The state as of now."""
        engine_state = State(str(self._engine.health.state))
        if self._failure is not None or engine_state is State.DEAD:
            return State.DEAD
        if self._is_draining:
            return State.DRAINING
        if not self._is_text_ready and engine_state in (State.READY, State.DEGRADED):
            return State.STARTING
        return engine_state

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be taken."""
        return self.state in (State.READY, State.DEGRADED)

    @property
    def is_live(self) -> bool:
        """Whether waiting can still help; if not, the process should be restarted."""
        return self.state is not State.DEAD

    @property
    def stage(self) -> str:
        """What is going on while the server starts, for people."""
        if self.state is not State.STARTING:
            return str(self.state)
        engine_is_up = str(self._engine.health.state) in (State.READY, State.DEGRADED)
        return "tokenizer" if engine_is_up else str(self._engine.health.stage or State.STARTING)

    @property
    def cause(self) -> str | None:
        """Why the server is degraded or dead."""
        return self._failure or self._engine.health.cause

    def check_ready(self) -> None:
        """Raise `EngineNotReadyError` or `EngineDeadError`, with the reason, where a request would not be taken."""
        state = self.state
        if state is State.DEAD:
            raise EngineDeadError(f"the engine is gone: {self.cause or 'unknown cause'}")
        if state is State.STARTING:
            raise EngineNotReadyError(f"the model is loading (stage: {self.stage})")
        if state is State.DRAINING:
            raise EngineNotReadyError("the server is shutting down; send the request to another replica")

    def snapshot(self) -> dict[str, Any]:
        """The body of `/health`: plain values. `since` is when the state began, in seconds since the epoch."""
        stats = self._engine.stats
        self._notice()
        return {
            "state": str(self.state),
            "stage": self.stage,
            "since": self._since,
            "cause": self.cause,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
        }

    def text_is_ready(self) -> None:
        """The tokenizers are up."""
        self._is_text_ready = True
        self._notice()

    def drain(self) -> None:
        """The server takes no new requests from now on."""
        self._is_draining = True
        self._notice()

    def fail(self, cause: str) -> None:
        """The server can never serve (again), whatever the engine says."""
        self._failure = cause
        self._notice()

    def engine_changed(self) -> None:
        """The engine's health may have changed."""
        self._notice()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener()` after each change of state; returns what ends the subscription."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notice(self) -> None:
        state = self.state
        if state is self._state:
            return
        self._state = state
        self._since = time.time()
        for listener in list(self._listeners):
            listener()
