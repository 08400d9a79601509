"""A generation runner over a generator of the test's own, and jobs for it."""

from __future__ import annotations

from typing import Any, cast

from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue
from pagoda.request import GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.serving.generation import GenerationRunner
from pagoda.serving.health import ModelHealth
from pagoda.text.generation import TextGenerator
from pagoda.text.output import GenerationChunk


class Ready:
    def check_ready(self) -> None:
        pass


class Observer:
    def on_chunk(self, chunk: GenerationChunk) -> None:
        pass

    def on_end(self, error: BaseException | None) -> None:
        pass


class AnyNumber:
    """A client whose queue has a place for everybody."""

    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        return QueuePlaces(RequestQueue(), tenant, count)


def runner_of(generator: Any) -> GenerationRunner:
    """A runner that is always ready; `generator` needs `generate`, and a `client` for several jobs."""
    return GenerationRunner(
        cast("TextGenerator", generator),
        cast("ModelHealth", Ready()),
        request_timeout_seconds=None,
        observe=lambda job, arrival: Observer(),
    )


def job(seconds: float | None = None) -> GenerationRequest:
    """A job that has `seconds` to live."""
    return GenerationRequest(prompt="x", params=SamplingParams(), timeout_seconds=seconds)
