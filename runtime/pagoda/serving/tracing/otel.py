"""Traces by OpenTelemetry's SDK, whose `OTEL_…` variables hold: sampler, propagators, resource, limits.

A job that is not sampled costs what it would cost without tracing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from typing_extensions import override

from pagoda.engine.client.interface import EngineClient
from pagoda.serving.generation import Job, RequestObserver
from pagoda.serving.tracing.calls import GrpcSpan, HttpSpan
from pagoda.serving.tracing.export import make_exporter
from pagoda.serving.tracing.requests import Clock, RequestSpan, StepEvents, request_attributes
from pagoda.serving.tracing.seam import CallSpan, Header, Tracing
from pagoda.version import __version__

_CLOSE_SECONDS = 3.0


class OtelTracing(Tracing):
    """Exports spans to `endpoint`. `is_detailed`: those of jobs have the engine's steps as events."""

    def __init__(self, endpoint: str, *, is_detailed: bool = False) -> None:
        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "pagoda"}))
        resource = Resource({"service.version": __version__}).merge(resource)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(make_exporter(endpoint)))
        self._tracer = self._provider.get_tracer("pagoda", __version__)
        self._steps = StepEvents() if is_detailed else None

    @override
    def http_call(self, scope: Any, header: Header, status: Callable[[], int]) -> CallSpan:
        return HttpSpan(self._tracer, scope, header, status)

    @override
    def grpc_call(self, method: str, header: Header, status: Callable[[], tuple[int, str]]) -> CallSpan:
        return GrpcSpan(self._tracer, method, header, status)

    @override
    def observer(self, model_name: str, job: Job, arrival_time: float, observer: RequestObserver) -> RequestObserver:
        clock = Clock()
        span = self._tracer.start_span("llm_request", start_time=clock.nanoseconds(arrival_time))
        if not span.is_recording():
            return observer
        span.set_attributes(request_attributes(model_name, job))
        return RequestSpan(self._tracer, span, job, arrival_time, observer, clock, self._steps)

    @override
    def watch(self, client: EngineClient) -> None:
        if self._steps is not None:
            client.trace(self._steps.listen)

    @override
    async def close(self) -> None:
        if self._steps is not None:
            self._steps.end_all()
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop did not wait
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=end, daemon=True, name="end-of-traces").start()
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), _CLOSE_SECONDS)
