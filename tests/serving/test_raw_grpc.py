"""gRPC before the key is known, as frames: what is kept of messages, who is let in meanwhile; bounds; renewal."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pagoda.serving import certificates
from pagoda.serving.grpc import health as grpc_health
from pagoda.serving.grpc import message_reader
from pagoda.serving.grpc.messages import message_class
from tests.support.grpc_harness import GrpcHarness, call_method, infer_request, texts_of
from tests.support.raw_grpc import RawGrpc
from tests.support.tls import write_self_signed_certificate
from tests.support.waiting import wait_until

KEY = "sk-known"
MIB = 2**20
SERVICE = "/inference.GRPCInferenceService/"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
UNAUTHENTICATED, UNIMPLEMENTED, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED = "16", "12", "8", "4"
GUARDED = ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "RepositoryIndex")
PUBLIC = (SERVICE + "ModelReady", CHECK, WATCH, REFLECTION)


@pytest.fixture(scope="module")
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness(api_keys=(KEY,)) as running:
        yield running


def rss() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("path", [*(SERVICE + method for method in GUARDED), *PUBLIC, SERVICE + "Unknown"])
def test_large_messages_without_a_key_are_not_kept(harness: GrpcHarness, path: str) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(RawGrpc(harness.server.port)) for _ in range(2)]
        message = connections[0].message(b"x" * (30 * MIB))
        before = rss()
        for connection in connections:
            streams = [connection.open(path) for _ in range(20)]
            for stream in streams:
                connection.send(stream, message[:-1])
            grown = rss() - before
            assert grown < 64 * MIB
            if path not in PUBLIC:
                expected = UNIMPLEMENTED if path == SERVICE + "Unknown" else UNAUTHENTICATED
                assert connection.statuses(streams) == [expected] * len(streams)


def test_a_guarded_call_is_refused_before_any_of_its_message_has_come(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        streams = [connection.open(SERVICE + method) for method in GUARDED]
        assert connection.statuses(streams) == [UNAUTHENTICATED] * len(streams)


def test_probes_come_through_while_others_hold_the_places(harness: GrpcHarness) -> None:
    health = health_pb2_grpc.HealthStub(harness.channel)
    with ExitStack() as stack:
        for path in PUBLIC:
            connection = stack.enter_context(RawGrpc(harness.server.port))
            for _ in range(8):
                connection.send(connection.open(path), connection.message(b"x" * MIB)[:1000])
        for _ in range(5):
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
            assert harness.stub("ModelReady")(message_class("ModelReadyRequest")(name="demo"), timeout=10).ready
        assert harness.stub("ServerLive")(message_class("ServerLiveRequest")(), timeout=10).live
        texts = texts_of(harness.infer(infer_request("hi"), metadata=[("authorization", f"Bearer {KEY}")]))
        assert texts == ["HI"]


def test_a_message_that_does_not_come_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_reader, "UNKNOWN_MESSAGE_SECONDS", 0.2)
    with (
        GrpcHarness(api_keys=(KEY,), body_timeout_seconds=0.2, max_grpc_message_bytes=65536) as harness,
        RawGrpc(harness.server.port) as connection,
    ):
        half = connection.message(b"x" * 1000)[:500]
        known = connection.open(SERVICE + "ModelInfer", ("authorization", f"Bearer {KEY}"))
        connection.send(known, half)
        unknown = [connection.open(path) for path in PUBLIC]
        for stream in unknown:
            connection.send(stream, half)
        assert connection.statuses([known, *unknown]) == [DEADLINE_EXCEEDED] * 5


def test_a_call_without_a_message_and_one_with_two(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        none = connection.open(CHECK)
        connection.send(none, b"", is_last=True)
        twice = connection.open(CHECK)
        connection.send(twice, connection.message(b"") * 2, is_last=True)
        large = connection.open(CHECK)
        connection.send(large, connection.message(b"x" * 100_000), is_last=True)
        broken = connection.open(CHECK)
        connection.send(broken, connection.message(b"\xff\xff"), is_last=True)
        assert connection.statuses([none, twice, large, broken]) == ["3", "0", RESOURCE_EXHAUSTED, "3"]


def test_reflection_answers_as_long_as_it_is_asked(harness: GrpcHarness) -> None:
    ask = reflection_pb2.ServerReflectionRequest
    requests = [ask(list_services=""), ask(file_containing_symbol="grpc.health.v1.Health")]
    answers = list(reflection_pb2_grpc.ServerReflectionStub(harness.channel).ServerReflectionInfo(iter(requests)))
    assert len(answers) == 2
    assert "inference.GRPCInferenceService" in [service.name for service in answers[0].list_services_response.service]


def test_watches_are_bounded(harness: GrpcHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "MAX_WATCHES", 2)
    watch = health_pb2_grpc.HealthStub(harness.channel).Watch
    first, second = (watch(health_pb2.HealthCheckRequest()) for _ in range(2))
    assert (next(first).status, next(second).status) == (1, 1)
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(health_pb2.HealthCheckRequest()))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()

    def is_free() -> bool:
        third = watch(health_pb2.HealthCheckRequest())
        try:
            return next(third).status == 1
        except grpc.RpcError:
            return False
        finally:
            third.cancel()

    wait_until(is_free)
    second.cancel()


def test_connections_are_bounded_and_a_preface_has_a_deadline() -> None:
    with GrpcHarness(max_connections=2, max_connections_per_peer=2, header_timeout_seconds=0.3) as harness:
        with RawGrpc(harness.server.port) as first, RawGrpc(harness.server.port) as second:
            for connection in (first, second):
                connection.wait(lambda: connection.receive(0.2))  # noqa: B023
            with RawGrpc(harness.server.port) as third:
                third.wait(lambda: third.receive(0.1))
                wait_until(lambda: first.receive(0.1) or first.is_closed)
                assert first.is_closed, "what waits longest makes room"
        with socket.create_connection(("127.0.0.1", harness.server.port), timeout=20) as silent:
            while silent.recv(4096):
                pass


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "CHECK_SECONDS", 0.02)
    certificate, key = write_self_signed_certificate(tmp_path, "localhost")
    with GrpcHarness(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as harness:
        port = harness.server.port

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)

        def trusting() -> grpc.Channel:
            return grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(certificate.read_bytes()))

        first = shown()
        assert first == certificate.read_text()
        with trusting() as before:
            assert texts_of(call_method(before, "ModelInfer")(infer_request("a"), timeout=10)) == ["A"]
            (tmp_path / "renewed").mkdir()
            renewed, its_key = write_self_signed_certificate(tmp_path / "renewed", "localhost")
            certificate.write_text(renewed.read_text())  # which the old key does not fit
            assert shown() == first
            key.write_text(its_key.read_text())
            wait_until(lambda: shown() == renewed.read_text())
            assert texts_of(call_method(before, "ModelInfer")(infer_request("b"), timeout=10)) == ["B"]
        with trusting() as after:
            assert texts_of(call_method(after, "ModelInfer")(infer_request("c"), timeout=10)) == ["C"]
