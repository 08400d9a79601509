"""grpc.health.v1, reflection and the life of the server: start before the model, truth about it, a graceful end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError
from pagoda.serving.grpc.messages import SERVICE_NAME
from tests.support.grpc_harness import HANG, GrpcHarness, infer_request, texts_of
from tests.support.waiting import wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECONDS = 60
A_LONG_GRACE = 10 * SECONDS
"""What ends before it does not wait for it."""
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness(is_ready=False) as running:
        yield running


def check(harness: GrpcHarness, service: str = "") -> int:
    return health_pb2_grpc.HealthStub(harness.channel).Check(health_pb2.HealthCheckRequest(service=service)).status


class Watcher:
    """Collects what Watch tells."""

    def __init__(self, harness: GrpcHarness, service: str = "") -> None:
        self.seen: list[int] = []
        self.call = health_pb2_grpc.HealthStub(harness.channel).Watch(health_pb2.HealthCheckRequest(service=service))
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self.seen.append(response.status)
        except grpc.RpcError:
            pass

    def expect(self, *statuses: int) -> None:
        wait_until(lambda: len(self.seen) >= len(statuses))
        assert self.seen == list(statuses)


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_check_follows_the_engine(harness: GrpcHarness, service: str) -> None:
    assert check(harness, service) == NOT_SERVING
    for state, status in (
        (EngineState.READY, SERVING),
        (EngineState.DEGRADED, SERVING),
        (EngineState.DRAINING, NOT_SERVING),
        (EngineState.DEAD, NOT_SERVING),
    ):
        harness.set_engine_state(state)
        assert check(harness, service) == status


def test_check_of_an_unknown_service_is_not_found(harness: GrpcHarness) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(harness, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watch_tells_every_change_once_to_every_watcher(harness: GrpcHarness) -> None:
    watchers = [Watcher(harness), Watcher(harness), Watcher(harness, SERVICE_NAME)]
    unknown = Watcher(harness, "other")
    for watcher in watchers:
        watcher.expect(NOT_SERVING)
    harness.set_engine_state(EngineState.READY)
    for watcher in watchers:
        watcher.expect(NOT_SERVING, SERVING)
    watchers[0].call.cancel()
    harness.set_engine_state(EngineState.DEGRADED)
    harness.set_engine_state(EngineState.DEAD, "lost")
    for watcher in watchers[1:]:
        watcher.expect(NOT_SERVING, SERVING, NOT_SERVING)
    unknown.expect(SERVICE_UNKNOWN)


def test_watch_ends_with_not_serving_when_the_server_stops() -> None:
    with GrpcHarness() as harness:
        watcher = Watcher(harness)
        watcher.expect(SERVING)
        harness.run(harness.server.stop, A_LONG_GRACE)
        watcher.expect(SERVING, NOT_SERVING)


def test_a_client_that_knows_nothing_can_call_the_service_through_reflection() -> None:
    with GrpcHarness() as harness:
        database = ProtoReflectionDescriptorDatabase(harness.channel)
        assert set(database.get_services()) == {
            SERVICE_NAME,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE_NAME).FindMethodByName("ModelInfer")
        request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        request = request_class(model_name="demo")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"hello")
        request.parameters["temperature"].double_param = 0.0
        response = harness.channel.unary_unary(
            f"/{SERVICE_NAME}/ModelInfer", request_class.SerializeToString, response_class.FromString
        )(request, timeout=10)
        assert texts_of(response) == ["HELLO"]
        for name in ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"):
            assert pool.FindServiceByName(name).methods
        with pytest.raises(KeyError):
            pool.FindServiceByName("inference.Nothing")


def stopping(harness: GrpcHarness, grace: float) -> Future[None]:
    future: Future[None] = Future()

    def run() -> None:
        harness.run(harness.server.stop, grace)
        future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_graceful_stop_lets_running_requests_end_and_refuses_new_ones() -> None:
    with GrpcHarness() as harness:
        harness.generator.seconds_per_token = 0.03
        requests: list[Any] = [infer_request("x" * 20, id=str(number)) for number in range(5)]
        calls = [harness.stub("ModelInfer").future(request, timeout=20) for request in requests]
        other = grpc.insecure_channel(harness.address, options=[("grpc.use_local_subchannel_pool", 1)])
        grpc.channel_ready_future(other).result(timeout=SECONDS)
        wait_until(lambda: len(harness.generator.started) == 5)
        stopped = stopping(harness, 10)
        assert [texts_of(call.result())[0] for call in calls] == ["X" * 20] * 5
        stopped.result(timeout=SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            harness.stub("ModelInfer", other)(infer_request("late"), timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_stop_ends_an_idle_stream_as_unavailable_at_once() -> None:
    with GrpcHarness() as harness:
        never = threading.Event()

        def requests() -> Iterator[Any]:
            yield infer_request("ab")
            never.wait(A_LONG_GRACE)

        responses = harness.stub("ModelStreamInfer")(requests())
        assert [texts_of(next(responses).infer_response)[0] for _ in range(2)] == ["A", "B"]
        stopped = stopping(harness, A_LONG_GRACE)
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stopped.result(timeout=SECONDS)
        never.set()


def test_what_does_not_end_within_the_grace_period_is_cut_off_and_aborted() -> None:
    with GrpcHarness() as harness:
        call = harness.stub("ModelInfer").future(infer_request(HANG), timeout=A_LONG_GRACE)
        wait_until(lambda: harness.generator.started)
        stopping(harness, 0.3).result(timeout=SECONDS)
        assert call.exception(timeout=SECONDS) is not None
        assert harness.generator.left == harness.generator.started


def test_a_taken_port_is_an_error_that_names_it(harness: GrpcHarness) -> None:
    second = GrpcHarness(grpc_port=harness.server.port)
    with pytest.raises(ConfigError, match=rf":{harness.server.port}; check host, grpc_port"):
        second.__enter__()
