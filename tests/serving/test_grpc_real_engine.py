"""`pagoda serve` with its real engine: gRPC's clients and REST give the same greedy text, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.rest_harness import checkpoint

CLIENTS = Path(__file__).resolve().parents[1] / "support" / "clients"
PROMPT = "Once upon a time"
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RunningServer:
    def __init__(self, log: Path) -> None:
        self.http_port, self.grpc_port, self.log = free_port(), free_port(), log
        arguments = ["--model", str(checkpoint()), "--model-name", "demo", "--host", "127.0.0.1", "--threads", "1"]
        arguments += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port), "--max-model-len", "128"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pagoda.cli.main", "serve", *arguments], stdout=output, stderr=output
            )
        self.rest = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=60)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx.TransportError):
                if self.rest.get("/v2/health/ready").status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_SECONDS} s:\n{self.log.read_text()}")

    def client(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CLIENTS / script), *arguments, f"127.0.0.1:{self.grpc_port}", "demo", PROMPT]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("serve") / "log")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.rest.close()
        running.process.kill()
        running.process.wait()


def report_of(client: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = client.communicate(timeout=100)
    assert client.returncode == 0, errors
    return json.loads(output)


def test_every_grpc_client_gets_the_text_that_rest_gives(server: RunningServer) -> None:
    body = {"text_input": PROMPT, "parameters": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}}
    expected = server.rest.post("/v2/models/demo/generate", json=body).raise_for_status().json()["text_output"]
    clients = [
        server.client("triton_grpc.py", "sync"),
        server.client("triton_grpc.py", "aio"),
        server.client("kserve_grpc.py"),
    ]
    sync, aio, kserve = map(report_of, clients)
    for report in (sync, aio):
        assert report["infer"]["text"] == [expected]
        assert "".join(piece["text"][0] for piece in report["streamed"]) == expected
        ids = [token_id for piece in report["streamed"] for token_id in piece["output_ids"][0]]
        assert [ids] == report["infer"]["output_ids"]
    assert sync["async_infer"]["text"] == [expected]
    assert kserve["typed"]["text"] == kserve["raw"]["text"] == expected

    lines = dict(line.rsplit(" ", 1) for line in server.rest.get("/metrics").text.splitlines() if line[0] != "#")
    model = 'model_name="demo"'
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert float(lines[f"pagoda_{gauge}{{{model}}}"]) == 0, gauge
    num_sequences = 1 + 5 + 2 + 2  # REST, tritonclient (one request has two prompts), its aio twin, KServe's client
    assert float(lines[f'pagoda_request_success_total{{finished_reason="length",{model}}}']) == num_sequences
    assert float(lines[f"pagoda_generation_tokens_total{{{model}}}"]) == num_sequences * 8


def test_the_server_ends_in_order_when_told(server: RunningServer) -> None:
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(timeout=30) == 0, server.log.read_text()
