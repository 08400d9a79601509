"""The engine's state machine: one owner, every change with its cause.

    starting ──▶ ready ⇄ degraded ──▶ draining ──▶ dead
       ▲  └────────┼────────┼────────────────────▶ dead
       └───────────┴────────┘  the core was lost, and is started anew

Ready and live are different questions. A starting or draining engine is live and not ready; a dead one is neither.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

logger = logging.getLogger(__name__)

Listener = Callable[[], None]


class EngineState(StrEnum):
    """What the engine can do for a client. `DEGRADED` serves, with less than it should have."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    DEAD = "dead"


_ALLOWED = {
    EngineState.STARTING: {EngineState.READY, EngineState.DRAINING, EngineState.DEAD},
    EngineState.READY: {EngineState.STARTING, EngineState.DEGRADED, EngineState.DRAINING, EngineState.DEAD},
    EngineState.DEGRADED: {EngineState.STARTING, EngineState.READY, EngineState.DRAINING, EngineState.DEAD},
    EngineState.DRAINING: {EngineState.DEAD},
    EngineState.DEAD: set(),
}


class EngineHealth:
    """The state, since when, and why. `since` is seconds since the epoch; listeners hear of state and stage changes."""

    def __init__(self) -> None:
        self.state = EngineState.STARTING
        self.stage = "config"
        self.detail = ""
        self.cause: str | None = None
        self.since = time.time()
        self.transitions: Counter[tuple[str, str]] = Counter()
        self._listeners: list[Listener] = []

    @property
    def accepts_requests(self) -> bool:
        """Whether a request sent now would be taken."""
        return self.state in (EngineState.READY, EngineState.DEGRADED)

    def transition(self, state: EngineState, cause: str, *, is_expected: bool = False) -> None:
        """Move to `state`; staying is no transition, and a move that the picture does not have is a bug: `ValueError`.

        `is_expected`: an end that was asked for is no error in the log.
        """
        if state is self.state:
            return
        if state not in _ALLOWED[self.state]:
            raise ValueError(f"the engine cannot go from {self.state} to {state} ({cause})")
        level = logging.ERROR if state is EngineState.DEAD and not is_expected else logging.INFO
        logger.log(level, "engine %s -> %s: %s", self.state, state, cause)
        self.transitions[self.state.value, state.value] += 1
        self.state, self.cause, self.since = state, cause, time.time()
        if state is not EngineState.STARTING:
            self.stage, self.detail = state.value, ""
        self._notify()

    def enter_stage(self, stage: str, detail: str = "") -> None:
        """Note the start-up stage, for people and for the startup probe."""
        self.stage, self.detail = stage, detail
        self._notify()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener()` after every change; returns what ends the subscription."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()
