"""Hundreds of clients that say nothing, or half of something, with the timeouts as they are: they are gone in the end."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import psutil
import pytest

from tests.support.grpc_harness import GrpcHarness, infer_request, texts_of
from tests.support.raw_grpc import RawGrpc
from tests.support.raw_http import RawClient
from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

NUM_CLIENTS = 320
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"POST /v2/models/demo/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
CHUNK = b"POST /v2/models/demo/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"
BEGINNINGS = (b"", LIVE, LIVE[:-2], HALF, CHUNK, LIVE[:20], b"\r\n")
MIB = 2**20


def test_silent_connections_are_all_closed() -> None:
    with RestHarness() as harness, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(harness.port)) for _ in range(NUM_CLIENTS)]
        for index, client in enumerate(clients):
            client.send(BEGINNINGS[index % len(BEGINNINGS)])
        wait_until(lambda: len(harness.server._connections) >= NUM_CLIENTS)
        harness.client.close()
        wait_until(lambda: len(harness.server._connections) == 0, seconds=100)


def test_a_flood_without_a_key_takes_no_memory_and_keeps_nobody_out() -> None:
    """Connections, heads, bodies and trailers of unknown keys, one after the other as fast as they go, for a while."""
    with (
        RestHarness(api_keys=("known",), max_connections=200, max_connections_per_peer=100) as harness,
        ExitStack() as stack,
    ):
        harness.client.get("/v2/health/live")
        before = psutil.Process().memory_info().rss
        is_over = threading.Event()

        def flood(kind: int) -> None:
            while not is_over.is_set():
                with ExitStack() as opened:
                    for _ in range(60):
                        client = opened.enter_context(RawClient(harness.port))
                        client.send(
                            BEGINNINGS[kind % len(BEGINNINGS)], b"x" * 50_000 if kind % 2 else b"A: b\r\n" * 1000
                        )

        floods = [threading.Thread(target=flood, args=(kind,)) for kind in range(4)]
        for thread in floods:
            thread.start()
        stack.callback(lambda: [thread.join(60) for thread in floods])
        stack.callback(is_over.set)
        worst = 0
        for _ in range(40):
            with RawClient(harness.port, address="127.0.0.2") as client:
                client.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer known\r\n\r\n")
                response = client.read()
                assert response is not None
                assert response.status == 200
            worst = max(worst, psutil.Process().memory_info().rss - before)
            time.sleep(0.25)
        assert worst < 64 * MIB


def test_many_slow_messages_of_known_keys_do_not_keep_others_out() -> None:
    bearer = ("authorization", "Bearer known")
    with GrpcHarness(api_keys=("known",)) as harness, ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(RawGrpc(harness.server.port))
            for _ in range(20):
                stream = connection.open("/inference.GRPCInferenceService/ModelInfer", bearer)
                connection.send(stream, connection.message(b"x" * 1000)[:500])
        assert texts_of(harness.infer(infer_request("hi"), metadata=[bearer])) == ["HI"]
