"""Traces: a client's context goes on through the server's spans, which an OTLP collector gets over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineTrace, TracedBlocks, TracedRow, TracedStep
from pagoda.errors import ConfigError, ErrorKind, QueueFullError
from pagoda.logs import trace_id_var
from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.serving.tracing import setup
from pagoda.serving.tracing.export import protocol_of
from pagoda.serving.tracing.otel import OtelTracing
from pagoda.text.output import GenerationChunk
from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.otlp_collector import OtlpCollector, values_of
from tests.support.ports import free_port
from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SHORT = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0.5, "top_k": 3}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector("http") as running:
        yield running


@pytest.fixture(scope="module")
def rest(collector: OtlpCollector) -> Iterator[RestHarness]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        with RestHarness(otlp_traces_endpoint=collector.endpoint) as running:
            yield running


@pytest.fixture
def spans(collector: OtlpCollector) -> OtlpCollector:
    collector.spans.clear()
    return collector


def test_a_request_is_one_trace_from_the_client_to_the_last_byte(rest: RestHarness, spans: OtlpCollector) -> None:
    rest.engine.step_seconds = 0.005
    rest.engine.num_cached_tokens = 2
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=x", "x-request-id": "mine"}
    answer = rest.client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
    assert answer.status_code == 200
    (call,) = spans.wait_for("POST /v1/chat/completions")
    (request,), (queue,), (prefill,), (decode,) = (
        spans.wait_for(name) for name in ("llm_request", "queue", "prefill", "decode")
    )
    assert (call.trace_id.hex(), call.parent_span_id.hex(), call.trace_state) == (TRACE, PARENT, "vendor=x")
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert request.parent_span_id == call.span_id
    assert {part.parent_span_id for part in (queue, prefill, decode)} == {request.span_id}
    assert {span.trace_id.hex() for span in spans.spans} == {TRACE}
    assert call.start_time_unix_nano <= request.start_time_unix_nano == queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= request.end_time_unix_nano <= call.end_time_unix_nano
    assert (call.kind, values_of(call)["http.response.status_code"]) == (call.SPAN_KIND_SERVER, 200)
    known = values_of(request)
    assert known == known | {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 3.0,
        "gen_ai.request.n": 1,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert values_of(call)["pagoda.request_id"] == "mine"
    assert known["gen_ai.request.id"].startswith("chatcmpl-")
    assert known["gen_ai.usage.prompt_tokens"] == known["gen_ai.usage.input_tokens"] > 2
    parts = [
        f"gen_ai.latency.{part}"
        for part in ("time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode", "e2e")
    ]
    assert all(known[part] >= 0 for part in parts)
    assert known["gen_ai.latency.time_in_model_decode"] >= 3 * 0.005
    assert spans.resource == spans.resource | {"service.name": "pagoda", "deployment.environment": "test"}
    assert set(spans.paths) == {"/v1/traces"}


def test_a_parent_that_is_not_sampled_is_none_here(rest: RestHarness, spans: OtlpCollector) -> None:
    sent = rest.client.post("/v1/completions", json=SHORT, headers={"traceparent": TRACEPARENT[:-1] + "0"})
    assert sent.status_code == 200
    assert sent.headers["traceresponse"].endswith("-00")  # a span of the caller's trace, that nobody records
    assert rest.client.post("/v1/completions", json=SHORT, headers={"traceparent": "no"}).status_code == 200
    assert "traceresponse" not in rest.client.get("/health").headers
    rest.client.post("/tokenize", json=SHORT)
    (request,) = spans.wait_for("llm_request")  # of the second, whose header is none
    assert request.trace_id.hex() != TRACE


def test_choices_have_phases_of_their_own(rest: RestHarness, spans: OtlpCollector) -> None:
    rest.client.post("/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 2})
    decodes = spans.wait_for("decode", 3)
    assert sorted(values_of(one)["pagoda.sequence"] for one in decodes) == [0, 1, 2]
    (request,) = spans.wait_for("llm_request")
    assert values_of(request) == values_of(request) | {
        "gen_ai.usage.completion_tokens": 6,
        "gen_ai.usage.num_sequences": 3,
    }


def test_what_fails_says_why(rest: RestHarness, spans: OtlpCollector, caplog: pytest.LogCaptureFixture) -> None:
    logged: set[str | None] = set()
    caplog.handler.addFilter(lambda record: logged.add(trace_id_var.get()) is None)
    rest.engine.max_requests = 0
    assert rest.client.post("/v1/completions", json=SHORT).status_code == 429
    rest.engine.max_requests = None
    rest.engine.fail_after = (1, ErrorKind.INTERNAL)
    assert rest.client.post("/v1/completions", json=SHORT).status_code == 500
    rest.engine.fail_after = None
    calls = spans.wait_for("POST /v1/completions", 2)
    requests = spans.wait_for("llm_request", 2)
    assert calls[1].trace_id.hex() in logged
    assert [values_of(one)["error.type"] for one in requests] == ["queue_full", "internal"]
    assert [one.status.code for one in requests] == [2, 2]
    assert [one.status.code for one in calls] == [0, 2]  # a client's error is none of the server's
    assert all("failed as asked" not in str(one) for one in spans.spans)


def test_a_client_that_leaves_ends_its_spans(rest: RestHarness, spans: OtlpCollector) -> None:
    rest.engine.step_seconds = 0.02
    with rest.client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 100, "stream": True}) as sent:
        next(sent.iter_bytes())
    rest.engine.step_seconds = 0.0
    (request,) = spans.wait_for("llm_request")
    assert values_of(request)["gen_ai.response.finish_reasons"] == ["abort"]
    assert request.status.code == 0


def test_grpc_calls_by_grpc() -> None:
    with OtlpCollector("grpc") as collector, GrpcHarness(otlp_traces_endpoint=collector.endpoint) as harness:
        harness.infer(infer_request("abc"), metadata=(("traceparent", TRACEPARENT),))
        with pytest.raises(grpc.RpcError):
            harness.infer(infer_request("bug"))
        calls = collector.wait_for("inference.GRPCInferenceService/ModelInfer", 2)
        (request, _) = collector.wait_for("llm_request", 2)
        assert (calls[0].trace_id.hex(), calls[0].parent_span_id.hex()) == (TRACE, PARENT)
        assert request.parent_span_id == calls[0].span_id
        assert values_of(calls[0]) == values_of(calls[0]) | {"rpc.method": "ModelInfer", "rpc.grpc.status_code": 0}
        assert values_of(calls[1])["error.type"] == "INTERNAL"


def test_a_collector_that_is_down_is_logged_once_and_disturbs_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.05")
    port = free_port()
    caplog.set_level(logging.INFO)
    with RestHarness(otlp_traces_endpoint=f"http://127.0.0.1:{port}/v1/traces") as rest:
        for _ in range(2):  # a failed export each, of which the first is logged
            assert rest.client.post("/v1/completions", json=SHORT).status_code == 200
            wait_until(lambda: "cannot be exported" in caplog.text, "the failure is logged")
        with OtlpCollector("http", port) as collector:
            while not collector.spans:
                assert rest.client.post("/v1/completions", json=SHORT).status_code == 200
            rest.run(rest.context.tracing.close)
    lines = [record.getMessage() for record in caplog.records if "traces" in record.getMessage()]
    assert len(lines) == 2, lines
    assert "cannot be exported" in lines[0]
    assert lines[1].endswith("again")
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


async def test_detailed_spans_have_the_steps_of_their_request() -> None:
    with OtlpCollector("http") as collector:
        tracing = OtelTracing(collector.endpoint, is_detailed=True)
        listeners: list[Any] = []
        tracing.watch(_Traced(listeners))  # type: ignore[arg-type]
        job = GenerationRequest(request_id="a", params=SamplingParams())
        observer = tracing.observer("demo", job, 0.0, _NoObserver())
        other = tracing.observer("demo", GenerationRequest(request_id="b", params=SamplingParams()), 0.0, _NoObserver())
        last = GenerationChunk(token_ids=[1], finish_reason=FinishReason.STOP, num_prompt_tokens=5, scheduled_time=1.0)
        observer.on_chunk(last)
        observer.on_end(None)
        rows = [TracedRow("a#7", 0, 5, 0, 1), TracedRow("unknown#1", 0, 3, 0, 0)]
        step = TracedStep(3, 1.0, 0.25, 0, 0, rows, [("a#7", "stop")])
        listeners[0](0, EngineTrace(2.0, [step, step], TracedBlocks(0, "", {})))
        other.on_end(QueueFullError("full", 1))
        await tracing.close()  # ends those that wait for their last steps
        of_a, of_b = sorted(collector.wait_for("llm_request", 2), key=lambda one: len(one.events), reverse=True)
        assert [values_of(event)["pagoda.step.tokens"] for event in of_a.events] == [8, 8]
        assert values_of(of_a)["gen_ai.latency.time_in_model_execute"] == 0.5
        assert not of_b.events


class _NoObserver:
    def on_chunk(self, chunk: GenerationChunk) -> None: ...

    def on_end(self, error: BaseException | None) -> None: ...


class _Traced:
    def __init__(self, listeners: list[Any]) -> None:
        self.trace = listeners.append


def test_the_protocol_is_that_of_the_variable_or_the_url() -> None:
    assert protocol_of("http://collector:4317", {}) == "grpc"
    assert protocol_of("collector:4317", {}) == "grpc"
    assert protocol_of("http://collector:4318", {}) == "http/protobuf"
    assert protocol_of("https://collector/v1/traces", {}) == "http/protobuf"
    assert protocol_of("http://collector:4318", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}) == "grpc"
    assert protocol_of("http://collector:4317", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}) == "http/protobuf"
    with pytest.raises(ConfigError, match="grpc or http/protobuf"):
        protocol_of("http://collector:4317", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})


def test_without_the_packages_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PagodaConfig(otlp_traces_endpoint="http://collector:4317")
    setup.check_tracing(config)
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        setup.check_tracing(config)
    setup.check_tracing(PagodaConfig())
    assert asyncio.iscoroutinefunction(setup.make_tracing(PagodaConfig()).close)
