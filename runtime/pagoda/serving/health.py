"""Health as every protocol reports it: REST probes, gRPC health, V2 readiness and repository index, `/health`, metrics.

There is one state machine, the engine's (`engine.health`). The server adds what only it knows: that its tokenizers must be up
before it accepts requests, that it is draining, that it has failed. Ready and live are different questions: a server that
loads, restarts its engine or drains is live and not ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pagoda.engine.health import EngineState
from pagoda.errors import EngineDeadError, EngineNotReadyError

if TYPE_CHECKING:
    from pagoda.engine.client.client import EngineClient

Listener = Callable[[], None]

TOKENIZER_PHASE = "tokenizer"


class ServerHealth:
    """The engine's state machine, and the server's own transitions of it. Not ready before `text_is_ready` was called."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        engine.health.hold(TOKENIZER_PHASE)

    @property
    def state(self) -> EngineState:
        """The state as of now."""
        return self._engine.health.state

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be accepted."""
        return self._engine.health.accepts_requests

    @property
    def is_live(self) -> bool:
        """Whether the server can still become ready; if not, its process should be restarted."""
        return self.state is not EngineState.DEAD

    @property
    def phase(self) -> str:
        """The start-up phase while the server starts, else the state; for people."""
        return self._engine.health.phase

    @property
    def cause(self) -> str | None:
        """Why the server is in its state."""
        return self._engine.health.cause

    def check_ready(self) -> None:
        """Raise `EngineNotReadyError` or `EngineDeadError`, with the reason, where a request would not be accepted."""
        state = self.state
        if state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.cause or 'unknown cause'}")
        if state is EngineState.STARTING:
            doing = "engine is restarting" if self._engine.health.has_started else "model is loading"
            raise EngineNotReadyError(f"the {doing} (stage: {self.phase})")
        if state is EngineState.DRAINING:
            raise EngineNotReadyError("the server is shutting down; send the request to another replica")

    def summary(self) -> dict[str, Any]:
        """Of `snapshot`, what a probe needs and everybody may know."""
        health = self._engine.health
        return {"state": str(health.state), "started": health.has_started, "stage": health.phase}

    def snapshot(self) -> dict[str, Any]:
        """The body of `/health`: plain values. `since` is when the state began, in seconds since the epoch.

        `started` is true from the first time the server was ready, so a startup probe that has seen it succeeds for good.
        `step` counts the engine's steps since its core started; `seconds_since_progress` is the age of its last heartbeat.
        Both are None while there is no core. `ranks`: with more than one process to a model, each of them; `replicas`: with
        more than one engine, each of them.
        """
        now = time.monotonic()
        health, stats, progress = self._engine.health, self._engine.stats, self._engine.heartbeat
        is_up = progress is not None and progress.is_up
        return {
            "state": str(health.state),
            "started": health.has_started,
            "stage": health.phase,
            "detail": health.detail,
            "since": health.since,
            "cause": health.cause,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "step": progress.step if progress is not None and is_up else None,
            "seconds_since_progress": now - progress.time if progress is not None and is_up else None,
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

    def drain(self, cause: str) -> None:
        """Refuse new requests from now on; running ones continue."""
        if self.state not in (EngineState.DRAINING, EngineState.DEAD):
            self._engine.health.transition(EngineState.DRAINING, cause)

    def fail(self, cause: str) -> None:
        """The server has failed for good, whatever the engine's own state."""
        self._engine.health.transition(EngineState.DEAD, cause)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener()` after each change of state or phase; returns what ends the subscription."""
        return self._engine.health.subscribe(listener)
