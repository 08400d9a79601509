"""Sends spans to an OTLP collector, in batches and in a thread of the SDK; one that does not answer is logged once.

The SDK keeps at most 2048 spans (`OTEL_BSP_MAX_QUEUE_SIZE`) while it waits, and drops the oldest ones then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from typing_extensions import override

from pagoda.errors import ConfigError

logger = logging.getLogger(__name__)

PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOLS = ("grpc", "http/protobuf")
HTTP_PATH = "/v1/traces"
HTTP_PORT = 4318


def protocol_of(endpoint: str, environ: Mapping[str, str] = os.environ) -> str:
    """One of `PROTOCOLS`: that of the environment, else HTTP for a URL that has OTLP's HTTP path or port, else gRPC.

    Raises `ConfigError` for a protocol that the SDK does not have.
    """
    for variable in PROTOCOL_VARIABLES:
        if value := environ.get(variable):
            if value not in PROTOCOLS:
                raise ConfigError(f"{variable} is {value[:50]!r}; traces are exported by {' or '.join(PROTOCOLS)}")
            return value
    url = _split(endpoint)
    return "http/protobuf" if url.path.rstrip("/") == HTTP_PATH or url.port == HTTP_PORT else "grpc"


def make_exporter(endpoint: str) -> SpanExporter:
    """The exporter to `endpoint`, `http://collector:4317` or `http://collector:4318/v1/traces`.

    TLS, headers, compression and time limits are those of the SDK's `OTEL_EXPORTER_OTLP_…` variables. Raises `ConfigError`.
    """
    try:
        if protocol_of(endpoint) == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return LoggedOnce(GrpcExporter(endpoint=endpoint), endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        url = _split(endpoint)
        path = HTTP_PATH if url.path in ("", "/") else url.path
        return LoggedOnce(HttpExporter(endpoint=url._replace(path=path).geturl()), endpoint)
    except ValueError as error:
        raise ConfigError(f"otlp_traces_endpoint {endpoint[:200]!r} cannot be used: {error}") from error


class LoggedOnce(SpanExporter):
    """An exporter that logs its first failure, and that it works again, in place of a line for each batch."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._works = True
        self._last = _LastMessage()
        theirs = logging.getLogger("opentelemetry.exporter")
        theirs.propagate = False
        theirs.handlers = [self._last]

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._last.text = ""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # whatever a collector answers, the next batch is tried
            self._last.text = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        works = result is SpanExportResult.SUCCESS
        if works and not self._works:
            logger.info("traces are exported to %s again", self._endpoint)
        elif not works and self._works:
            logger.warning(
                "traces cannot be exported to %s, and are dropped until it takes them: %s",
                self._endpoint,
                self._last.text[:500] or "no reason was given",
            )
        self._works = works
        return result

    @override
    def shutdown(self) -> None:
        self._exporter.shutdown()

    @override
    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastMessage(logging.Handler):
    """Keeps what an exporter would have logged."""

    text = ""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.text = record.getMessage()


def _split(endpoint: str) -> SplitResult:
    return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
