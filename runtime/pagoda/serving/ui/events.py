"""What a viewer sees of the running engines: one stream of events for each viewer, nothing recorded without one.

    {"type": "server"}   first: version, models with their limits, start-up phases and changes of state so far
    {"type": "health"}   a model changed its state or stage, and twice a second with its figures
    {"type": "trace"}    steps of an engine and a part of its KV cache (`engine.messages.EngineTrace`)
    {"type": "requests"} those that ended since the last one, with their latencies (`serving.metrics.ended_request`)
    {"type": "lost"}     the viewer reads too slowly: so many events before this one were left out

Times are seconds since the epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import asdict
from typing import Any

import pagoda
from pagoda.engine.health import EngineState
from pagoda.engine.messages import EngineTrace, TracedStep
from pagoda.errors import QueueFullError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.event_stream import event
from pagoda.serving.metrics.ended_request import EndedRequest, EndListener
from pagoda.serving.models import ServedModel

MAX_VIEWERS = 16
_EVERY_SECONDS = 0.5
MAX_ENDED = 2000
"""Requests that have ended and a viewer does not know yet; of more the last."""
MAX_UNSENT = 200
"""Events of a viewer who does not read; older ones are dropped, and counted."""


class Unsent:
    """What a viewer has not read yet, and how much was dropped before it."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._events: deque[dict[str, Any]] = deque()
        self._num_lost = 0

    def put(self, content: dict[str, Any]) -> None:
        """Add an event, the oldest goes where there are too many."""
        if len(self._events) == MAX_UNSENT:
            self._events.popleft()
            self._num_lost += 1
        self._events.append(content)
        self.arrived.set()

    def take(self) -> dict[str, Any] | None:
        """The next event; None where there is none."""
        if self._num_lost:
            num_lost, self._num_lost = self._num_lost, 0
            return {"type": "lost", "time": time.time(), "events": num_lost}
        return self._events.popleft() if self._events else None


class Viewers:
    """Those who watch the server, at most `MAX_VIEWERS`."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._num_viewers = 0

    async def watch(self, *, kernels: bool = False) -> AsyncGenerator[bytes, None]:
        """The events of one viewer, until the server ends; `kernels`: those of steps with what ran in them.

        Raises `QueueFullError` before the first event if there are too many viewers.
        """
        if self._num_viewers >= MAX_VIEWERS:
            raise QueueFullError(f"{MAX_VIEWERS} viewers watch this server, which is the limit", 10)
        self._num_viewers += 1
        unsent = Unsent()
        put = unsent.put
        ended: dict[str, deque[EndedRequest]] = {}
        ends: dict[ServedModel, list[Callable[[], None]]] = {}

        def follow() -> None:
            """Watch the models that are served now, of which one may be another version than before."""
            models = list(self._context.models)
            if models == list(ends):
                return
            put(self._server())
            for gone in ends.keys() - models:
                for end in ends.pop(gone):
                    end()
            for served in models:
                if served not in ends:
                    changed = served.health.subscribe(lambda served=served: put(_health(served)))  # type: ignore[misc]
                    traced = served.client.trace(_tracer(served, put, kernels=kernels), kernels=kernels)
                    requests = ended.setdefault(served.name, deque(maxlen=MAX_ENDED))
                    ends[served] = [traced, changed, _listen(served, requests.append)]

        try:
            while True:
                follow()
                while (content := unsent.take()) is not None:
                    yield event(content)
                for name, requests in ended.items():
                    if known := list(requests):
                        requests.clear()
                        yield event(_requests(name, known))
                if self._context.health.state is EngineState.DEAD:
                    return
                unsent.arrived.clear()
                try:
                    await asyncio.wait_for(unsent.arrived.wait(), _EVERY_SECONDS)
                except TimeoutError:
                    for served in self._context.models:
                        put(_health(served))
        finally:
            self._num_viewers -= 1
            for of_model in ends.values():
                for end in of_model:
                    end()

    def _server(self) -> dict[str, Any]:
        return {
            "type": "server",
            "time": time.time(),
            "version": pagoda.__version__,
            "models": [_model(served) for served in self._context.models],
        }


def _listen(served: ServedModel, listener: EndListener) -> Callable[[], None]:
    """Have `listener` called with each sequence that ends, until what is returned is called."""
    listeners = served.metrics.end_listeners
    listeners.append(listener)
    return lambda: listeners.remove(listener)


def _requests(model: str, ended: Iterable[EndedRequest]) -> dict[str, Any]:
    return {
        "type": "requests",
        "model": model,
        "time": time.time(),
        "requests": [one._asdict() for one in ended],
    }


def _model(served: ServedModel) -> dict[str, Any]:
    history = [change._asdict() for change in served.client.health.history]
    return {"name": served.name, "aliases": list(served.aliases), "history": history, **_health(served)}


def _health(served: ServedModel) -> dict[str, Any]:
    ready = served.ready
    return {
        "type": "health",
        "model": served.name,
        "time": time.time(),
        "health": served.health.snapshot(),
        "stats": asdict(served.client.stats),
        "limits": None if ready is None else asdict(ready),
    }


def _tracer(
    served: ServedModel, put: Callable[[dict[str, Any]], None], *, kernels: bool
) -> Callable[[int, EngineTrace], None]:
    def listen(replica: int, trace: EngineTrace) -> None:
        epoch = time.time() - time.monotonic()
        blocks = trace.blocks
        ran: dict[str, Any] = {}
        if kernels and trace.kernels:
            shown = [
                [one.name, one.started + epoch, one.seconds, one.thread, one.on_device, one.rank]
                for one in trace.kernels
            ]
            ran = {"kernels": shown, "lost_kernels": trace.num_lost_kernels}
        put(
            {
                **ran,
                "type": "trace",
                "model": served.name,
                "replica": replica,
                "time": trace.now + epoch,
                "steps": [_step(step, epoch) for step in trace.steps],
                "arrivals": [[name, arrival + epoch] for name, arrival in trace.arrivals],
                "waiting": trace.waiting,
                "blocks": {"first": blocks.first, "states": blocks.states, "holders": blocks.holders},
            }
        )

    return listen


def _step(step: TracedStep, epoch: float) -> dict[str, Any]:
    """Rows as lists, [request, computed before, tokens, drafts, new tokens], for there are many."""
    return {
        "step": step.step,
        "time": step.submitted + epoch,
        "seconds": step.seconds,
        "waiting": step.num_waiting,
        "preempted": step.num_preempted,
        "ended": step.ended,
        "rows": [[row.request_id, row.num_computed, row.num_tokens, row.num_drafts, row.num_new] for row in step.rows],
    }
