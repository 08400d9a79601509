"""The one truth about health that every door shows: REST probes, KServe's data plane, gRPC health and `/health`.

It joins what the engine says of itself with what only the server knows: that the tokenizers are up, and that the server is
going away. Ready and live are different questions: a server that loads or drains is live and not ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from pagoda.engine.health import EngineHealth, EngineState
from pagoda.engine.messages import EngineStats
from pagoda.errors import EngineDeadError, EngineNotReadyError

Listener = Callable[[], None]


class EngineLike(Protocol):
    """What is read of `pagoda.engine.client.EngineClient`."""

    @property
    def health(self) -> EngineHealth:
        """The engine's own state."""

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its last step."""


class ServerHealth:
    """State of the whole server, and its changes; listeners hear of changes of state only."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._is_text_ready = False
        self._failure: str | None = None
        self._listeners: list[Listener] = []
        self._state = EngineState.STARTING
        self._since = time.time()
        engine.health.subscribe(self._notice)

    @property
    def state(self) -> EngineState:
        """The state as of now."""
        engine_health = self._engine.health
        if self._failure is not None:
            return EngineState.DEAD
        if engine_health.accepts_requests and not self._is_text_ready:
            return EngineState.STARTING
        return engine_health.state

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be taken."""
        return self.state in (EngineState.READY, EngineState.DEGRADED)

    @property
    def is_live(self) -> bool:
        """Whether waiting can still help; if not, the process should be restarted."""
        return self.state is not EngineState.DEAD

    @property
    def stage(self) -> str:
        """What is going on, for people: the start-up stage while the server starts, else the state."""
        engine_health = self._engine.health
        if self.state is not EngineState.STARTING:
            return str(self.state)
        return "tokenizer" if engine_health.accepts_requests else engine_health.stage

    @property
    def cause(self) -> str | None:
        """Why the server is degraded or dead."""
        return self._failure or self._engine.health.cause

    def check_ready(self) -> None:
        """Raise `EngineNotReadyError` or `EngineDeadError`, with the reason, where a request would not be taken."""
        state = self.state
        if state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is gone: {self.cause or 'unknown cause'}")
        if state is EngineState.STARTING:
            raise EngineNotReadyError(f"the model is loading (stage: {self.stage})")
        if state is EngineState.DRAINING:
            raise EngineNotReadyError("the server is shutting down; send the request to another replica")

    def snapshot(self) -> dict[str, Any]:
        """The body of `/health`: plain values. `since` is when the state began, in seconds since the epoch."""
        stats = self._engine.stats
        return {
            "state": str(self.state),
            "stage": self.stage,
            "detail": self._engine.health.detail,
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

    def drain(self, cause: str) -> None:
        """Take no new requests from now on; those under way go on."""
        if self._engine.health.state not in (EngineState.DRAINING, EngineState.DEAD):
            self._engine.health.transition(EngineState.DRAINING, cause)

    def fail(self, cause: str) -> None:
        """The server can never serve (again), whatever the engine says."""
        self._failure = cause
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
