"""An OTLP collector on a free port, by HTTP and gRPC, that keeps the spans it was sent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class OtlpCollector:
    """Use as a context; `endpoint` is what a server is told. `paths`: of HTTP requests. `resource`: the last attributes."""

    def __init__(self, protocol: Literal["http", "grpc"], port: int = 0) -> None:
        self._protocol = protocol
        self._port = port
        self.spans: list[Span] = []
        self.paths: list[str] = []
        self.resource: dict[str, Any] = {}

    def __enter__(self) -> OtlpCollector:
        if self._protocol == "grpc":
            self._grpc = grpc.server(ThreadPoolExecutor(1))
            handler = grpc.unary_unary_rpc_method_handler(
                lambda request, _: self._take(request),
                request_deserializer=ExportTraceServiceRequest.FromString,
                response_serializer=ExportTraceServiceResponse.SerializeToString,
            )
            service, _, method = _EXPORT[1:].partition("/")
            self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
            self._port = self._grpc.add_insecure_port(f"127.0.0.1:{self._port}")
            self._grpc.start()
            self.endpoint = f"http://127.0.0.1:{self._port}"
            return self
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.append(self.path)
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = collector._take(ExportTraceServiceRequest.FromString(body)).SerializeToString()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._port}/v1/traces"
        return self

    def __exit__(self, *exception: object) -> None:
        if self._protocol == "grpc":
            self._grpc.stop(None).wait(5)
            return
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def _take(self, request: ExportTraceServiceRequest) -> ExportTraceServiceResponse:
        for of_resource in request.resource_spans:
            self.resource = values_of(of_resource.resource)
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans
        return ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    def wait_for(self, name: str, count: int = 1) -> list[Span]:
        """So many spans of a name, once they are there."""
        deadline = time.monotonic() + 10
        while len(self.named(name)) < count:
            assert time.monotonic() < deadline, f"no {name!r} among {[span.name for span in self.spans]}"
            time.sleep(0.01)
        return self.named(name)


def values_of(span: Any) -> dict[str, Any]:
    """The attributes of a span, an event or a resource as Python has them."""
    return {attribute.key: _plain(attribute.value) for attribute in span.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_plain(one) for one in found.values] if kind == "array_value" else found
