"""The gRPC port and clients that mean no good, or are merely odd: frames that bring nothing, messages without end, floods."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import grpc
import h2.errors
import h2.exceptions
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagoda.serving.grpc import connection as grpc_connection
from pagoda.serving.grpc.messages import ModelInferResponse, message_class
from pagoda.serving.http import connections
from tests.support.grpc_harness import GrpcHarness, infer_request, texts_of
from tests.support.measured_server import MeasuredServer
from tests.support.raw_grpc import RawGrpc
from tests.support.waiting import wait_until

ALICE, BOB = "sk-alice", "sk-bob"
BY_ALICE, BY_BOB = ("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")
MIB = 2**20
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
CHECK = "/grpc.health.v1.Health/Check"
OK, RESOURCE_EXHAUSTED, UNIMPLEMENTED = "0", "8", "12"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
BEGINNINGS = (
    b"",
    PREFACE[:10],
    PREFACE,
    PREFACE + SETTINGS,
    PREFACE + SETTINGS + b"\0\x40\0\1\0\0\0\0\1" + b"\x82" * 1000,  # a head of 16 KiB, as far as it has come
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",  # TLS
)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


@pytest.fixture(scope="module")
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness(
        api_keys=(ALICE, BOB),
        max_grpc_message_bytes=MIB,
        max_body_bytes=MIB,
        max_inflight_body_bytes=4 * MIB,
    ) as running:
        yield running


def is_cut(connection: socket.socket, data: bytes) -> bool:
    """Whether the server ends the connection over which this is sent again and again."""
    try:
        for _ in range(200):
            connection.sendall(data)
            time.sleep(0.005)
    except ConnectionError:
        return True
    return False


def check(port: int, source: str = "127.0.0.1") -> None:
    """As the kubelet does, on a connection of its own."""
    with RawGrpc(port, source=source) as kubelet:
        stream = kubelet.open(CHECK)
        kubelet.send(stream, kubelet.message(b""), is_last=True)
        assert kubelet.statuses([stream]) == [OK]


def request_of(text: str) -> bytes:
    return bytes(infer_request(text).SerializeToString())


def test_a_message_that_is_too_large_is_refused_before_it_comes(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        stream = connection.open(INFER, BY_ALICE)
        connection.send(stream, struct.pack(">BI", 0, 2**32 - 1))
        assert connection.statuses([stream]) == [RESOURCE_EXHAUSTED]
        stream = connection.open(CHECK)
        connection.send(stream, struct.pack(">BI", 0, 2**32 - 1))
        assert connection.statuses([stream]) == [RESOURCE_EXHAUSTED]


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_a_key_may_have_as_many_bytes_of_messages_under_way_as_are_free(harness: GrpcHarness, path: str) -> None:
    memory = harness.memory
    with RawGrpc(harness.server.port) as alice, RawGrpc(harness.server.port) as bob:
        content = alice.message(b"x" * (MIB - 100))
        streams = []
        for _ in range(5):
            streams.append(alice.open(path, BY_ALICE))
            alice.send(streams[-1], content[: MIB // 2])
        alice.wait(lambda: len(alice.ended) == 3)
        assert alice.ended == dict.fromkeys(streams[2:], RESOURCE_EXHAUSTED)
        wait_until(lambda: 1.9 * MIB < memory.num_bytes < 2 * MIB)
        small = alice.open(INFER, BY_ALICE)
        alice.send(small, alice.message(request_of("small")), is_last=True)
        assert alice.statuses([small]) == [OK]
        of_bob = bob.open(path, BY_BOB)
        bob.send(of_bob, content[: MIB // 2])
        wait_until(lambda: memory.num_bytes > 2.9 * MIB)
    wait_until(lambda: memory.num_bytes == 0)


def test_messages_of_every_size_come_through_in_any_pieces(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        for size in (0, 40, 20_000, 65_535, 65_536, 300_000, 900_000):
            request = infer_request("hello", id="i")
            request.parameters["sequence_id"].string_param = ""
            padding = size and b"\xa2\x06" + _varint(size) + b"\0" * size  # an unknown field
            content = connection.message(bytes(request.SerializeToString()) + (padding or b""))
            stream = connection.open(INFER, BY_ALICE)
            connection.send(stream, content[:3])
            connection.send(stream, content[3:], is_last=True)
            expected = OK if size <= 65_536 else RESOURCE_EXHAUSTED  # too long a text, once it is there
            assert connection.statuses([stream]) == [expected], size


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


@pytest.mark.parametrize(
    "flood",
    [
        frame(6, 0, 0, b"12345678"),
        SETTINGS,
        frame(2, 0, 1, b"\0\0\0\0\1"),
        frame(0x7F, 0, 0),
        frame(8, 0, 0, b"\0\0\0\1"),
    ],
    ids=["pings", "settings", "priorities", "unknown frames", "window updates"],
)
def test_frames_that_bring_nothing_end_their_connection_and_no_other(harness: GrpcHarness, flood: bytes) -> None:
    with socket.create_connection(("127.0.0.1", harness.server.port), timeout=20) as connection:
        connection.sendall(PREFACE + SETTINGS)
        assert is_cut(connection, flood * 1000)
    answer = harness.infer(infer_request("hi"), metadata=[BY_ALICE])
    assert texts_of(answer) == ["HI"]


def test_calls_that_are_reset_as_soon_as_they_begin_end_their_connection(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        for _ in range(5000):
            if connection.is_closed:
                break
            with suppress(h2.exceptions.ProtocolError):
                connection.reset(connection.open(INFER, BY_ALICE))
            connection.receive(0.001)
        assert connection.goaway == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert texts_of(harness.infer(infer_request("hi"), metadata=[BY_ALICE])) == ["HI"]


def test_a_head_without_end_is_not_kept(harness: GrpcHarness) -> None:
    with socket.create_connection(("127.0.0.1", harness.server.port), timeout=20) as connection:
        connection.sendall(PREFACE + SETTINGS + frame(1, 0, 1, b"\x82"))
        assert is_cut(connection, frame(9, 0, 1, b"\0" * 16_000))


def test_many_calls_on_one_connection_are_served_and_one_with_a_bad_head_is_alone(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        good = [connection.open(INFER, BY_ALICE) for _ in range(300)]
        odd = connection.open(INFER, ("x-odd", " spaces \t"), BY_ALICE)
        unknown = connection.open("/no/Such", BY_ALICE)
        for stream in (*good, odd):
            connection.send(stream, connection.message(request_of("hi")), is_last=True)
        assert set(connection.statuses([*good, odd])) == {OK}
        assert connection.statuses([unknown]) == [UNIMPLEMENTED]


def test_a_client_that_goes_away_gets_the_response_under_way(harness: GrpcHarness) -> None:
    with RawGrpc(harness.server.port) as connection:
        stream = connection.open(INFER, BY_ALICE)
        connection.write(frame(7, 0, 0, b"\0" * 8))  # GOAWAY
        connection.send(stream, connection.message(request_of("hi")), is_last=True)
        assert connection.statuses([stream]) == [OK]


def test_thousands_of_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_HEAD_BYTES", 64 * 1024)
    num_connections = 200
    with GrpcHarness(api_keys=(ALICE,), max_connections=num_connections) as harness, ExitStack() as stack:
        port = harness.server.port
        before = psutil.Process().memory_info().rss
        for number in range(5 * num_connections):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            client.sendall(BEGINNINGS[number % len(BEGINNINGS)])
            if number % 200 == 0:
                check(port)
        registry = harness.server._connections
        assert len(registry) <= num_connections // 2 + 1, "of one peer"
        assert psutil.Process().memory_info().rss - before < 64 * MIB
        check(port, source="127.0.0.2")
        texts = texts_of(harness.infer(infer_request("hi"), metadata=[BY_ALICE], wait_for_ready=True))
        assert texts == ["HI"], "the same peer is served, too"


def test_a_connection_with_a_call_under_way_makes_no_room_and_a_peer_has_its_share() -> None:
    with GrpcHarness(api_keys=(ALICE,), max_connections=4, max_connections_per_peer=2) as harness, ExitStack() as stack:
        port = harness.server.port
        busy = [stack.enter_context(RawGrpc(port)) for _ in range(2)]
        for connection in busy:
            connection.send(connection.open(STREAM, BY_ALICE), connection.message(b"")[:2])
        registry = harness.server._connections
        wait_until(lambda: len(registry) == 2 and not registry._waiting)
        third = stack.enter_context(RawGrpc(port))
        wait_until(lambda: not third.receive(0.05) and third.is_closed)
        assert not any(connection.receive(0) and connection.is_closed for connection in busy)
        check(port, source="127.0.0.2")


def test_calls_in_all_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.serving.grpc.server.MAX_CONCURRENT_CALLS", 3)
    with GrpcHarness() as harness, RawGrpc(harness.server.port) as connection:
        streams = [connection.open(STREAM) for _ in range(4)]
        connection.wait(lambda: bool(connection.ended))
        assert connection.ended == {streams[3]: RESOURCE_EXHAUSTED}


def test_a_client_that_answers_no_pings_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_connection, "KEEPALIVE_SECONDS", 0.2)
    monkeypatch.setattr(grpc_connection, "KEEPALIVE_TIMEOUT_SECONDS", 0.2)
    with (
        GrpcHarness(keep_alive_timeout_seconds=0.4) as harness,
        socket.create_connection(("127.0.0.1", harness.server.port), timeout=20) as silent,
    ):
        silent.sendall(PREFACE + SETTINGS)
        with suppress(ConnectionResetError):
            while silent.recv(4096):
                pass


def test_a_connection_without_a_call_is_asked_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_connection, "IDLE_SECONDS", 0.2)
    with GrpcHarness(keep_alive_timeout_seconds=0.4) as harness:
        with RawGrpc(harness.server.port) as idle:
            wait_until(lambda: idle.receive(0.05) and idle.is_closed)
            assert idle.goaway == h2.errors.ErrorCodes.NO_ERROR
        for _ in range(3):
            request = message_class("ServerReadyRequest")()
            assert harness.stub("ServerReady")(request, timeout=10, wait_for_ready=True).ready


def test_a_response_that_nobody_reads_ends() -> None:
    with (
        GrpcHarness(send_timeout_seconds=0.4) as harness,
        RawGrpc(harness.server.port, window=10) as connection,
    ):
        stream = connection.open(INFER)
        connection.send(stream, connection.message(request_of("hi")), is_last=True)
        assert connection.statuses([stream]) == ["4"]
    with GrpcHarness() as harness, RawGrpc(harness.server.port, window=10) as connection:
        stream = connection.open(INFER)
        connection.send(stream, connection.message(request_of("hi")), is_last=True)
        while stream not in connection.ended:
            connection.receive(0.05)
            connection.widen(stream, 7)
        assert connection.ended[stream] == OK
        response = ModelInferResponse.FromString(connection.received[stream][5:])
        assert texts_of(response) == ["HI"]


def test_a_burst_of_heads_does_not_stop_the_loop() -> None:
    with MeasuredServer(api_keys=ALICE) as server:
        server.wait_until_ready()
        with RawGrpc(server.grpc_port) as connection:
            connection.wait(lambda: connection.receive(0.2))
            for _ in range(2):  # the second time with a table of headers that knows them
                with server.measured() as cost:
                    streams = [connection.open(INFER, flush=False) for _ in range(1000)]
                    connection.flush()
                    assert set(connection.statuses(streams)) == {"16"}
                    assert cost.stall < 0.1
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
