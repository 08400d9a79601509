"""`pagoda serve --data-parallel-size 2`: one endpoint, and a replica that is lost leaves it serving."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

BODY = {"text_input": "Once upon a time", "parameters": {"max_tokens": 8, "temperature": 0}}


def engine_pids(server: ServerProcess) -> list[int]:
    pid = server.process.pid
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if b"pagoda.engine.core.process" in Path(f"/proc/{child}/cmdline").read_bytes()]


def health_in_state(server: ServerProcess, state: str) -> dict | None:
    report = server.client.get("/health").json()
    return report if report["state"] == state else None


@pytest.mark.timeout(500)
def test_two_replicas_behind_one_endpoint() -> None:
    with ServerProcess(data_parallel_size=2) as server:
        server.wait_until_ready()
        assert len(engine_pids(server)) == 2
        assert [replica["state"] for replica in server.client.get("/health").json()["replicas"]] == ["ready", "ready"]

        def ask(_: int) -> httpx.Response:
            return server.client.post("/v2/models/demo/generate", json=BODY)

        with ThreadPoolExecutor(8) as pool:
            texts = {answer.json()["text_output"] for answer in pool.map(ask, range(24))}
            assert len(texts) == 1
            changed = server.client.patch("/settings", json={"max_num_seqs": 2, "max_num_waiting": 64})
            assert changed.status_code == 200, changed.text
            refused = server.client.patch("/settings", json={"max_num_seqs": 4096, "max_num_batched_tokens": 4096})
            assert (refused.status_code, "sized at start" in refused.text) == (400, True), refused.text
            assert server.client.post("/sleep").status_code == 200
            assert {answer.json()["text_output"] for answer in pool.map(ask, range(8))} == texts  # they wake
            os.kill(engine_pids(server)[0], signal.SIGKILL)
            report = wait_until(lambda: health_in_state(server, "degraded"), seconds=200)
            assert "engine replica" in report["cause"]
            assert server.client.get("/v2/health/ready").status_code == 200
            answers = list(pool.map(ask, range(24)))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["text_output"] for answer in answers} == texts
        wait_until(lambda: health_in_state(server, "ready"), seconds=200)
        metrics = server.client.get("/metrics").text
        assert 'pagoda_engine_restarts_total{model_name="demo"} 1.0' in metrics
        assert 'pagoda_replica_up{model_name="demo",replica="1"} 1.0' in metrics
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert "Traceback" not in server.log
