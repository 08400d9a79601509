"""The state machine: one owner, every change with its cause. All protocols of a server show this one.

    starting ──▶ ready ⇄ degraded ──▶ draining ──▶ dead
       ▲  └────────┼────────┼────────────────────▶ dead
       └───────────┴────────┘  the core failed, and is restarted

Several replicas, all of them failed, go from starting to degraded when the first is back. In a server of several models an
engine may be unloaded, from any state, and loaded again, from `unloaded` or `dead`. One that is idle may be put to sleep, and
wakes up by way of `starting`.

Readiness is not liveness. A starting or draining engine is live and not ready; a dead one is neither. Other
components that must be up before requests are taken (a server's tokenizers) keep the engine in `starting` with `hold`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

logger = logging.getLogger(__name__)

Listener = Callable[[], None]

_HISTORY_LENGTH = 50


class EngineState(StrEnum):
    """What the engine can do for a client. `DEGRADED` serves with reduced capacity."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    DEAD = "dead"
    UNLOADED = "unloaded"
    SLEEPING = "sleeping"


NOT_LOADED = (EngineState.UNLOADED, EngineState.DEAD)
SERVING = (EngineState.READY, EngineState.DEGRADED)

ALLOWED = {
    EngineState.STARTING: {EngineState.READY, EngineState.DEGRADED, EngineState.DRAINING, EngineState.DEAD},
    EngineState.READY: {
        EngineState.STARTING,
        EngineState.DEGRADED,
        EngineState.DRAINING,
        EngineState.DEAD,
        EngineState.SLEEPING,
    },
    EngineState.DEGRADED: {
        EngineState.STARTING,
        EngineState.READY,
        EngineState.DRAINING,
        EngineState.DEAD,
        EngineState.SLEEPING,
    },
    EngineState.DRAINING: {EngineState.DEAD},
    EngineState.DEAD: set(),
    EngineState.UNLOADED: {EngineState.DEAD},
    EngineState.SLEEPING: {EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD},
}

# A failure is an error, whether the engine is restarted or not.
_LEVELS = {
    EngineState.STARTING: logging.ERROR,
    EngineState.DEGRADED: logging.WARNING,
    EngineState.DEAD: logging.ERROR,
}


class Transition(NamedTuple):
    """A change of state, at `time` seconds since the epoch."""

    time: float
    state: EngineState
    cause: str


class EngineHealth:
    """The state, since when, and why; `history`: the last changes. `since` is seconds since the epoch; listeners are called on
    changes of state and stage.

    `name`: its name in the log.
    """

    def __init__(self, name: str = "engine") -> None:
        self.name = name
        self.state = EngineState.STARTING
        self.phase = "config"
        self.detail = ""
        self.cause: str | None = None
        self.since = time.time()
        self.is_loading = True  # not started yet, rather than restarting
        self.is_drained = False
        self.transitions: Counter[tuple[str, str]] = Counter()
        self.history: deque[Transition] = deque(maxlen=_HISTORY_LENGTH)
        self._held_by: list[str] = []
        self._held_back: tuple[EngineState, str] | None = None  # the state it enters on release, and the cause
        self._listeners: list[Listener] = []

    @property
    def shown_state(self) -> EngineState:
        """The state as clients see it: one that serves, and may serve none by the setting `drain`, is draining."""
        return EngineState.DRAINING if self.is_drained and self.state in SERVING else self.state

    def drain(self, is_drained: bool) -> None:
        """Have the server refuse requests, or not any more. To the engine itself it is nothing: it restarts where it fails."""
        if is_drained != self.is_drained:
            self.is_drained = is_drained
            logger.info(
                "%s %s", self.name, "is drained: it takes no requests" if is_drained else "takes requests again"
            )
            self._notify()

    @property
    def accepts_requests(self) -> bool:
        """Whether the engine would take a request sent now."""
        return self.state in SERVING

    @property
    def has_started(self) -> bool:
        """Whether the engine was ever ready or degraded."""
        return any(target in SERVING for _, target in self.transitions)

    def transition(self, state: EngineState, cause: str, *, is_expected: bool = False) -> None:
        """Move to `state`; does nothing if that is the state. Raises `ValueError` for a transition that is not in `ALLOWED`.

        `READY` and `DEGRADED` wait in `STARTING` until what called `hold` has called `release`. `is_expected`: an end that was
        asked for is no error in the log.
        """
        self._held_back = None  # an engine that fails while it is held has nothing to be released into
        if state is self.state:
            return
        if state not in ALLOWED[self.state]:
            raise ValueError(f"the engine cannot go from {self.state} to {state} ({cause})")
        if state in SERVING and self._held_by:
            self._held_back = state, cause
            self.enter_phase(self._held_by[0])
            return
        self._enter(state, cause, logging.INFO if is_expected else _LEVELS.get(state, logging.INFO))

    def unload(self, cause: str) -> None:
        """The engine was ended because it is not wanted now: it may be loaded again."""
        self._held_back = None
        if self.state is not EngineState.UNLOADED:
            self._enter(EngineState.UNLOADED, cause, logging.INFO)

    def load(self, cause: str) -> None:
        """The engine is started anew after it was unloaded or had died."""
        self.is_loading = True
        self.phase, self.detail = "config", ""
        self._enter(EngineState.STARTING, cause, logging.INFO)

    def _enter(self, state: EngineState, cause: str, level: int) -> None:
        logger.log(level, "%s %s -> %s: %s", self.name, self.state, state, cause)
        self.transitions[self.state.value, state.value] += 1
        self.state, self.cause, self.since = state, cause, time.time()
        self.history.append(Transition(self.since, state, cause))
        if state is not EngineState.STARTING:
            self.phase, self.detail = state.value, ""
        if state in SERVING:
            self.is_loading = False
        self._notify()

    def hold(self, phase: str) -> None:
        """Do not become ready before `release(phase)`; meanwhile that is the phase shown."""
        self._held_by.append(phase)

    def release(self, phase: str) -> None:
        """End a `hold`; does nothing if there is none for `phase`."""
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
        """Call `listener()` after every change; returns a function that unsubscribes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()
