"""Spans of calls: from a caller's admission to the last byte of the response, under the parent that the headers name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import Getter
from typing_extensions import override

from pagoda.logs import request_id_var, trace_id_var
from pagoda.serving.tracing.seam import CallSpan, Header

_SERVER_ERROR = 500
TRACE_RESPONSE_HEADER = "traceresponse"
"""Of W3C Trace Context Level 2, and of OpenTelemetry's `TraceResponsePropagator`."""


class _OtelCallSpan(CallSpan):
    """A span of kind SERVER, whose parent is what the headers say; nothing until `begin`."""

    def __init__(self, tracer: trace.Tracer, name: str, header: Header) -> None:
        self._tracer = tracer
        self._name = name
        self._header = header
        self._span: trace.Span | None = None
        self._token: Any = None
        self._log_token: Any = None

    @override
    def begin(self) -> None:
        parent = propagate.extract(self._header, getter=_Headers())
        self._span = self._tracer.start_span(
            self._name,
            parent,
            trace.SpanKind.SERVER,
            attributes={"pagoda.request_id": request_id_var.get() or "", **self.first_attributes()},
        )
        self._token = contexts.attach(trace.set_span_in_context(self._span, parent))
        if self._span.is_recording():
            self._log_token = trace_id_var.set(trace.format_trace_id(self._span.get_span_context().trace_id))

    @override
    def response_headers(self) -> Mapping[str, str]:
        if self._span is None:
            return {}
        known = self._span.get_span_context()
        ids = f"{trace.format_trace_id(known.trace_id)}-{trace.format_span_id(known.span_id)}"
        return {TRACE_RESPONSE_HEADER: f"00-{ids}-{known.trace_flags:02x}"}

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._span is None:
            return
        contexts.detach(self._token)
        if self._log_token is not None:
            trace_id_var.reset(self._log_token)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self._failed(type(error).__name__)
        self.finish(self._span)
        self._span.end()

    def _failed(self, what: str) -> None:
        if self._span is not None:
            self._span.set_attribute("error.type", what)
            self._span.set_status(trace.StatusCode.ERROR)

    def first_attributes(self) -> dict[str, Any]:
        """What is known of the call when it begins."""
        return {}

    def finish(self, span: trace.Span) -> None:
        """Note how it ended."""


class HttpSpan(_OtelCallSpan):
    """Of a REST request, with the attributes of the semantic conventions for HTTP servers."""

    def __init__(self, tracer: trace.Tracer, scope: Any, header: Header, status: Callable[[], int]) -> None:
        super().__init__(tracer, scope["method"], header)
        self._scope = scope
        self._status = status

    @override
    def first_attributes(self) -> dict[str, Any]:
        scope = self._scope
        client = scope["client"]
        return {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            **({"client.address": client[0], "client.port": client[1]} if client else {}),
        }

    @override
    def finish(self, span: trace.Span) -> None:
        if (route := getattr(self._scope.get("route"), "path", None)) is not None:
            span.update_name(f"{self._scope['method']} {route}")
            span.set_attribute("http.route", route)
        if status := self._status():
            span.set_attribute("http.response.status_code", status)
            if status >= _SERVER_ERROR:
                self._failed(str(status))


class GrpcSpan(_OtelCallSpan):
    """Of an RPC, with the attributes of the semantic conventions for gRPC; a stream of requests is one."""

    def __init__(
        self, tracer: trace.Tracer, method: str, header: Header, status: Callable[[], tuple[int, str]]
    ) -> None:
        super().__init__(tracer, method, header)
        self._status = status

    @override
    def first_attributes(self) -> dict[str, Any]:
        service, _, method = self._name.rpartition("/")
        return {"rpc.system": "grpc", "rpc.system.name": "grpc", "rpc.service": service, "rpc.method": method}

    @override
    def finish(self, span: trace.Span) -> None:
        number, name = self._status()
        span.set_attribute("rpc.grpc.status_code", number)
        span.set_attribute("rpc.response.status_code", name)
        if name in ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"):
            self._failed(name)


class _Headers(Getter[Header]):
    """Reads headers by their names, which is all that a propagator needs."""

    @override
    def get(self, carrier: Header, key: str) -> list[str] | None:
        value = carrier(key.lower())
        return None if value is None else [value]

    @override
    def keys(self, carrier: Header) -> list[str]:
        return []
