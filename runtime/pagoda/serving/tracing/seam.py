"""What a server asks of tracing. Nothing of OpenTelemetry is imported here, and without an endpoint nothing is recorded.

POST /v1/chat/completions   a call: from its admission to the last byte of the response       `CallSpan`
  └─ llm_request            a job: from its arrival to its last token                        `Tracing.observer`
       ├─ queue             tokenization, and waiting to be scheduled
       ├─ prefill           until the first token
       └─ decode            until the last token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.engine.client.interface import EngineClient
    from pagoda.serving.generation import Job, RequestObserver

Header = Callable[[str], str | None]
"""The value of a header of REST, or of gRPC's metadata, by its name."""


class CallSpan:
    """Of one call, as a context around all that it does; records nothing."""

    def __enter__(self) -> CallSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last byte was sent, or the call has failed."""

    def begin(self) -> None:
        """The caller was admitted to inference; what it does from here on is part of the span."""

    def response_headers(self) -> Mapping[str, str]:
        """Headers that tell the caller which span this is; none where nothing is recorded."""
        return {}


NO_SPAN = CallSpan()


class Tracing:
    """Exports nothing: that of a server without `otlp_traces_endpoint`."""

    def http_call(self, scope: Any, header: Header, status: Callable[[], int]) -> CallSpan:
        """The span of a REST request. `scope`: ASGI's; `status`: of the response, 0 before there is one."""
        return NO_SPAN

    def grpc_call(self, method: str, header: Header, status: Callable[[], tuple[int, str]]) -> CallSpan:
        """The span of an RPC. `method`: its full name; `status`: the number and the name of its code."""
        return NO_SPAN

    def observer(self, model_name: str, job: Job, arrival_time: float, observer: RequestObserver) -> RequestObserver:
        """`observer`, or one that also records the job. `arrival_time`: monotonic seconds."""
        return observer

    def watch(self, client: EngineClient) -> None:
        """Take in the steps of an engine, where those are part of the spans."""

    async def close(self) -> None:
        """Export what is left, for a few seconds at most."""
