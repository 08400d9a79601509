"""Connections as a whole: how many there may be and who makes room, clients that do not read, ends, and what they cost."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pagoda.serving.http import connections
from pagoda.serving.http.connection_server import ConnectionServer
from tests.support.raw_http import Pause, RawClient
from tests.support.rest_harness import RestHarness
from tests.support.tls import write_self_signed_certificate
from tests.support.waiting import wait_until

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
TIMEOUT = 0.4
MAX_CONNECTIONS = 6
MIB = 2**20


def post(path: str, content: object) -> bytes:
    body = json.dumps(content).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


GENERATE = post("/v2/models/demo/generate", {"text_input": "a", "max_tokens": 2})
HALF = b"POST /v2/models/demo/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


def ports_of(harness: RestHarness) -> set[int]:
    """The clients' ports of the connections there are."""
    return {connection.client[1] for connection in list(harness.server._connections._connections)}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def small() -> Iterator[RestHarness]:
    """A server that takes few connections, and gives them time."""
    with RestHarness(max_connections=MAX_CONNECTIONS, max_connections_per_peer=MAX_CONNECTIONS) as running:
        running.client.close()
        yield running


@pytest.fixture(scope="module")
def hasty() -> Iterator[RestHarness]:
    """A server whose every timeout is short."""
    with RestHarness(
        keep_alive_timeout_seconds=TIMEOUT,
        header_timeout_seconds=TIMEOUT,
        body_timeout_seconds=TIMEOUT,
        send_timeout_seconds=TIMEOUT,
    ) as running:
        yield running


def test_a_connection_that_waits_longest_makes_room_for_a_new_one(small: RestHarness) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(RawClient(small.port)) for _ in range(MAX_CONNECTIONS)]
        for client in idle:
            client.send(LIVE)
            assert client.read()
        idle[0].send(LIVE[:-2])  # half a head is no work either
        first, *others = idle
        with RawClient(small.port) as new:
            new.send(LIVE)
            assert new.read()
            assert first.read() is None
            for client in others:
                client.send(LIVE)
                assert client.read()


def test_one_with_a_request_under_way_makes_no_room(small: RestHarness) -> None:
    with ExitStack() as stack:
        busy = [stack.enter_context(RawClient(small.port)) for _ in range(MAX_CONNECTIONS)]
        for client in busy:
            client.send(HALF)
        ports = {client.port for client in busy}
        wait_until(lambda: ports_of(small) == ports and not small.server._connections._waiting)
        with RawClient(small.port) as new:
            new.send(LIVE)
            response = new.read()
            assert response is not None
            assert response.status == 503
            assert "max_connections" in response.json()["error"]
            assert new.read() is None
    wait_until(lambda: len(small.server._connections) == 0)
    with RawClient(small.port) as new:
        new.send(LIVE)
        assert new.read()


def test_the_oldest_heads_make_room_where_all_together_are_too_large(
    small: RestHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_HEAD_BYTES", 10_000)
    with RawClient(small.port) as first, RawClient(small.port) as second, RawClient(small.port) as third:
        for client in (first, second, third):
            client.send(LIVE[:-2] + b"A: " + b"a" * 4000)
            wait_until(lambda: client.port in ports_of(small))  # noqa: B023
        assert first.read() is None
        for client in (second, third):
            client.send(b"\r\n\r\n")
            assert client.read()
    assert small.server._connections._num_head_bytes == 0


def test_a_peer_has_its_share_and_others_the_rest() -> None:
    with RestHarness(max_connections=8, max_connections_per_peer=2) as harness, ExitStack() as stack:
        harness.client.close()
        for _ in range(2):
            stack.enter_context(RawClient(harness.port)).send(HALF)
        wait_until(lambda: len(harness.server._connections) == 2 and not harness.server._connections._waiting)
        with RawClient(harness.port) as third:
            third.send(LIVE)
            response = third.read()
            assert response is not None
            assert response.status == 503
        with RawClient(harness.port, address="127.0.0.2") as other:
            other.send(LIVE)
            response = other.read()
            assert response is not None
            assert response.status == 200


def test_a_stream_that_is_silent_for_longer_than_every_timeout_is_not_cut(hasty: RestHarness) -> None:
    hasty.call(hasty.engine.hold.clear)
    with RawClient(hasty.port) as client, RawClient(hasty.port) as whole:
        client.send(post("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}))
        whole.send(GENERATE)
        wait_until(lambda: hasty.engine.num_running == 2)
        time.sleep(3 * TIMEOUT)
        hasty.call(hasty.engine.hold.set)
        response = client.read()
        assert response is not None
        assert response.body.endswith(b"data: [DONE]\n\n")
        assert whole.read() is not None


def test_a_connection_in_use_is_not_idle(hasty: RestHarness) -> None:
    with RawClient(hasty.port) as client:
        for _ in range(6):
            client.send(LIVE, Pause(TIMEOUT / 2))
            assert client.read() is not None
        assert client.read() is None


@pytest.mark.parametrize(
    "sent",
    [
        post("/v1/completions", {"prompt": ["a"] * 64, "max_tokens": 120, "logprobs": 20, "stream": True}),
        b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
    ],
    ids=["a stream", "whole responses"],
)
def test_a_client_that_reads_nothing_is_cut_and_its_requests_end(hasty: RestHarness, sent: bytes) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        wait_until(lambda: connection.getsockname()[1] in ports_of(hasty))
        connection.sendall(sent)
        wait_until(lambda: connection.getsockname()[1] not in ports_of(hasty))
    wait_until(lambda: hasty.engine.num_running == 0)


def test_a_slow_reader_gets_everything(hasty: RestHarness) -> None:
    with RawClient(hasty.port) as client:
        client.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        for index in range(200):
            if index % 40 == 0:
                time.sleep(TIMEOUT / 2)
            response = client.read()
            assert response is not None
            assert response.status == 200


def test_a_client_that_closes_ends_its_request(hasty: RestHarness) -> None:
    hasty.call(hasty.engine.hold.clear)
    num_aborted = len(hasty.engine.aborted)
    client = RawClient(hasty.port)
    client.send(GENERATE + LIVE)
    wait_until(lambda: hasty.engine.num_running == 1)
    client.close()
    wait_until(lambda: len(hasty.engine.aborted) == num_aborted + 1)
    hasty.call(hasty.engine.hold.set)


def test_a_flood_of_pipelined_requests_waits_in_the_client(hasty: RestHarness) -> None:
    num_requests = 400_000
    with RawClient(hasty.port) as client:
        sending = threading.Thread(target=client.send, args=(LIVE * num_requests,))
        sending.start()
        for _ in range(50):
            response = client.read()
            assert response is not None
            assert response.status == 200
        assert sending.is_alive()
        (connection,) = [one for one in hasty.server._connections._connections if one.client[1] == client.port]  # type: ignore[attr-defined]
        assert len(connection._buffer) < MIB  # type: ignore[attr-defined]
        client.end()
        sending.join(10)
        assert not sending.is_alive()


def test_what_an_unknown_key_sends_is_not_kept() -> None:
    with RestHarness(api_keys=("known",), max_connections=256, max_connections_per_peer=256) as harness:
        harness.client.get("/v2/health/live")
        before = psutil.Process().memory_info().rss
        piece = b"x" * (64 * 1024)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 30000000\r\n\r\n"
        )
        with ExitStack() as stack:
            clients = [stack.enter_context(RawClient(harness.port)) for _ in range(80)]
            for client in clients:
                client.send(head)
            for _ in range(32):
                for client in clients:
                    client.send(piece)
            grown = psutil.Process().memory_info().rss - before
            for client in clients:
                response = client.read()
                assert response is not None
                assert response.status in (401, 429)  # many unknown keys are answered slowly, or not at all
        assert grown < 64 * MIB


def test_half_a_request_at_the_end_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConnectionServer, "close_seconds", 10)
    with RestHarness() as harness, RawClient(harness.port) as half, RawClient(harness.port) as head:
        half.send(HALF)
        head.send(LIVE[:-2])
        wait_until(lambda: len(harness.server._connections) >= 2)
        wait_until(lambda: len(harness.server._connections) - len(harness.server._connections._waiting) == 1)
        stopping = threading.Thread(target=harness.run, args=(harness.stop,))
        stopping.start()
        response = half.read()
        assert response is not None
        assert response.status == 503
        assert "shutting down" in response.json()["error"]
        assert half.read() is None
        assert head.read() is None
        half.close()
        stopping.join(20)


def test_a_response_under_way_at_the_end_is_complete() -> None:
    with RestHarness() as harness, RawClient(harness.port) as client:
        harness.call(harness.engine.hold.clear)
        client.send(GENERATE)
        wait_until(lambda: harness.engine.num_running == 1)
        stopping = threading.Thread(target=harness.run, args=(harness.stop,))
        stopping.start()
        wait_until(lambda: harness.server._connections.is_closing_soon)
        harness.call(harness.engine.hold.set)
        response = client.read()
        assert response is not None
        assert (response.status, response.headers["connection"]) == (200, "close")
        stopping.join(20)


def test_a_handshake_that_stops_ends_and_takes_a_place_until_another_wants_it(tmp_path: Path) -> None:
    certificate, key = write_self_signed_certificate(tmp_path, "localhost")
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    trusting = ssl.create_default_context(cafile=str(certificate))
    with RestHarness(**files, max_connections=2, header_timeout_seconds=30) as harness:
        harness.client.close()
        silent = [socket.create_connection(("127.0.0.1", harness.port), timeout=20) for _ in range(2)]
        wait_until(lambda: len(harness.server._connections) >= 1)
        with RawClient(harness.port, trusting) as client:
            client.send(LIVE)
            assert client.read()
            assert silent[0].recv(1) == b""
        for connection in silent:
            connection.close()
        wait_until(lambda: len(harness.server._connections) == 0)
    with RestHarness(**files, header_timeout_seconds=TIMEOUT) as harness:
        with socket.create_connection(("127.0.0.1", harness.port), timeout=20) as silent_one:
            assert silent_one.recv(1) == b""
        wait_until(lambda: len(harness.server._connections) == 0)
