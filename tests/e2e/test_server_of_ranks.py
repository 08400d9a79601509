"""`pagoda serve` with a model in two ranks: the answers of one, every rank in sight, and a lost one replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.support.observer import is_there
from tests.support.server import ServerProcess

SECONDS = 150.0  # two processes import torch, on a machine that may be busy

pytestmark = pytest.mark.timeout(600)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answer(server: ServerProcess) -> str:
    body = {"text_input": "Once upon a time", "parameters": {"temperature": 0, "max_tokens": 24}}
    response = server.client.post("/v2/models/demo/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()["text_output"]


def health(server: ServerProcess) -> dict:
    return server.client.get("/health").json()


def test_a_server_of_two_ranks_answers_like_one_and_replaces_both_when_one_is_killed() -> None:
    with ServerProcess() as server:
        server.wait_until_ready()
        expected = answer(server)
        assert health(server)["ranks"] == []
    with ServerProcess(tensor_parallel_size=2) as server:
        until(lambda: health(server)["state"] == "ready")
        assert answer(server) == expected
        until(lambda: len(health(server)["ranks"]) == 2)
        ranks = health(server)["ranks"]
        assert [(rank["rank"], rank["up"]) for rank in ranks] == [(0, True), (1, True)]
        assert 'pagoda_rank_up{host="' in server.client.get("/metrics").text

        os.kill(ranks[1]["pid"], signal.SIGKILL)
        until(lambda: health(server)["state"] == "starting")
        report = health(server)
        assert f"rank 1 of 2 (host {ranks[1]['host']}, pid {ranks[1]['pid']}) was killed by SIGKILL" in report["cause"]
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/v2/health/live").status_code == 200
        until(lambda: not any(is_there(rank["pid"]) for rank in ranks))
        until(lambda: health(server)["state"] == "ready")
        assert answer(server) == expected

        until(lambda: len(health(server)["ranks"]) == 2)
        ranks = health(server)["ranks"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not any(is_there(rank["pid"]) for rank in ranks)
