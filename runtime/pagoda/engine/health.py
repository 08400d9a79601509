"""The state machine: one owner, every change with its cause. All doors of a server show this one and no other.

    starting ──▶ ready ⇄ degraded ──▶ draining ──▶ dead
       ▲  └────────┼────────┼────────────────────▶ dead
       └───────────┴────────┘  the core was lost, and is started anew

Several replicas, all of them lost, go from starting to degraded when the first is back.

Ready and live are different questions. A starting or draining engine is live and not ready; a dead one is neither. What else
must be up before requests can be taken (a server's tokenizers) holds the engine in `starting`.
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


SERVING = (EngineState.READY, EngineState.DEGRADED)

ALLOWED = {
    EngineState.STARTING: {EngineState.READY, EngineState.DEGRADED, EngineState.DRAINING, EngineState.DEAD},
    EngineState.READY: {EngineState.STARTING, EngineState.DEGRADED, EngineState.DRAINING, EngineState.DEAD},
    EngineState.DEGRADED: {EngineState.STARTING, EngineState.READY, EngineState.DRAINING, EngineState.DEAD},
    EngineState.DRAINING: {EngineState.DEAD},
    EngineState.DEAD: set(),
}

# A loss is an error, whether the engine comes back or not.
_LEVELS = {
    EngineState.STARTING: logging.ERROR,
    EngineState.DEGRADED: logging.WARNING,
    EngineState.DEAD: logging.ERROR,
}


class EngineHealth:
    """The state, since when, and why. `since`: seconds since the epoch. Listeners are called when state or phase change.

    `name`: what the log calls it.
    """

    def __init__(self, name: str = "engine") -> None:
        self.name = name
        self.state = EngineState.STARTING
        self.phase = "config"
        self.detail = ""
        self.cause: str | None = None
        self.since = time.time()
        self.transitions: Counter[tuple[str, str]] = Counter()
        self._held_by: list[str] = []
        self._held_back: tuple[EngineState, str] | None = None  # where it would be if nothing held it, and why
        self._listeners: list[Listener] = []

    @property
    def accepts_requests(self) -> bool:
        """Whether a request sent now would be taken."""
        return self.state in SERVING

    @property
    def has_started(self) -> bool:
        """Whether requests could be taken at some time, whatever came after."""
        return any(target in SERVING for _, target in self.transitions)

    def transition(self, state: EngineState, cause: str, *, is_expected: bool = False) -> None:
        """Move to `state`; staying is no transition, and a move that the picture does not have is a bug: `ValueError`.

        `READY` and `DEGRADED` wait in `STARTING` for whatever was told to `hold` them. `is_expected`: an end that was asked
        for is no error in the log.
        """
        self._held_back = None  # an engine that is lost while it is held has nothing to be released into
        if state is self.state:
            return
        if state not in ALLOWED[self.state]:
            raise ValueError(f"the engine cannot go from {self.state} to {state} ({cause})")
        if state in SERVING and self._held_by:
            self._held_back = state, cause
            self.enter_phase(self._held_by[0])
            return
        level = logging.INFO if is_expected else _LEVELS.get(state, logging.INFO)
        logger.log(level, "%s %s -> %s: %s", self.name, self.state, state, cause)
        self.transitions[self.state.value, state.value] += 1
        self.state, self.cause, self.since = state, cause, time.time()
        if state is not EngineState.STARTING:
            self.phase, self.detail = state.value, ""
        self._notify()

    def hold(self, phase: str) -> None:
        """Do not become ready before `release(phase)`; meanwhile that is the phase shown."""
        self._held_by.append(phase)

    def release(self, phase: str) -> None:
        """What held the engine in `STARTING` is up; nothing happens if it did not hold it."""
        if phase not in self._held_by:
            return
        self._held_by.remove(phase)
        if self._held_back is not None:
            self.transition(*self._held_back)

    def enter_phase(self, phase: str, detail: str = "") -> None:
        """Note the start-up phase, for people and for the startup probe."""
        self.phase, self.detail = phase, detail
        self._notify()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener()` after every change; returns what ends the subscription."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()
