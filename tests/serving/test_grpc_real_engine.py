"""`pagoda serve` with its real engine: gRPC's clients and REST give the same greedy text, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess

CLIENTS = Path(__file__).resolve().parents[1] / "support" / "clients"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(max_model_len=128) as running:
        running.wait_until_ready()
        yield running


def client_of(server: ServerProcess, script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(CLIENTS / script), *arguments, f"127.0.0.1:{server.grpc_port}", "demo", PROMPT]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report_of(client: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = client.communicate(timeout=100)
    assert client.returncode == 0, errors
    return json.loads(output)


def test_every_grpc_client_gets_the_text_that_rest_gives(server: ServerProcess) -> None:
    body = {"text_input": PROMPT, "parameters": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}}
    expected = server.client.post("/v2/models/demo/generate", json=body).raise_for_status().json()["text_output"]
    clients = [
        client_of(server, "triton_grpc.py", "sync"),
        client_of(server, "triton_grpc.py", "aio"),
        client_of(server, "kserve_grpc.py"),
    ]
    sync, aio, kserve = map(report_of, clients)
    for report in (sync, aio):
        assert report["infer"]["text"] == [expected]
        assert "".join(piece["text"][0] for piece in report["streamed"]) == expected
        ids = [token_id for piece in report["streamed"] for token_id in piece["output_ids"][0]]
        assert [ids] == report["infer"]["output_ids"]
    assert sync["async_infer"]["text"] == [expected]
    assert kserve["typed"]["text"] == kserve["raw"]["text"] == expected

    lines = dict(line.rsplit(" ", 1) for line in server.client.get("/metrics").text.splitlines() if line[0] != "#")
    model = 'model_name="demo"'
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert float(lines[f"pagoda_{gauge}{{{model}}}"]) == 0, gauge
    num_sequences = 1 + 5 + 2 + 2  # REST, tritonclient (one request has two prompts), its aio twin, KServe's client
    assert float(lines[f'pagoda_request_success_total{{finished_reason="length",{model}}}']) == num_sequences
    assert float(lines[f"pagoda_generation_tokens_total{{{model}}}"]) == num_sequences * 8


def test_the_server_ends_in_order_when_told(server: ServerProcess) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
