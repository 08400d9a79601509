"""`pagoda serve` with a model in two ranks: right answers, every rank in sight, and a lost one replaced."""

from __future__ import annotations

import os
import signal

import pytest

from pagoda.models.checkpoint_source import demo_checkpoint
from tests.support.demo_questions import FactSheet
from tests.support.observer import is_there
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(600)

SETTINGS = {"kv_cache_memory_bytes": "64MiB", "dtype": "float32", "max_num_batched_tokens": 256}
SHEET = FactSheet.draw(seed=4, count=60)


def check_answer(server: ServerProcess) -> None:
    """A fact far back in a prompt of several chunks is told right."""
    messages, expected = SHEET.ask(3)
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == expected


def health(server: ServerProcess) -> dict:
    return server.client.get("/health").json()


def test_a_server_of_two_ranks_answers_right_and_replaces_both_when_one_is_killed() -> None:
    with ServerProcess(model=demo_checkpoint(), tensor_parallel_size=2, **SETTINGS) as server:
        wait_until(lambda: health(server)["state"] == "ready")
        check_answer(server)
        wait_until(lambda: len(health(server)["ranks"]) == 2)
        ranks = health(server)["ranks"]
        assert [(rank["rank"], rank["up"]) for rank in ranks] == [(0, True), (1, True)]
        assert 'pagoda_rank_up{host="' in server.client.get("/metrics").text

        os.kill(ranks[1]["pid"], signal.SIGKILL)
        wait_until(lambda: health(server)["state"] == "starting")
        report = health(server)
        assert f"rank 1 of 2 (host {ranks[1]['host']}, pid {ranks[1]['pid']}) was killed by SIGKILL" in report["cause"]
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/v2/health/live").status_code == 200
        wait_until(lambda: not any(is_there(rank["pid"]) for rank in ranks))
        wait_until(lambda: health(server)["state"] == "ready")
        check_answer(server)

        wait_until(lambda: len(health(server)["ranks"]) == 2)
        ranks = health(server)["ranks"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not any(is_there(rank["pid"]) for rank in ranks)
