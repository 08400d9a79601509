"""`pagoda serve` as a whole: listening before it is ready, the same text at every door, and every way it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.checkpoints import shared_checkpoint
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

PROMPT = "Once upon a time"
GREEDY = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        running.wait_until_ready()
        yield running


def generate(server: ServerProcess, **parameters: Any) -> httpx.Response:
    body = {"text_input": PROMPT, "parameters": parameters}
    return server.client.post("/v2/models/demo/generate", json=body)


def test_every_route_gives_the_same_greedy_text(server: ServerProcess) -> None:
    expected = generate(server, **GREEDY).json()["text_output"]
    assert expected
    infer_body = {
        "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}],
        "parameters": GREEDY,
    }
    assert server.client.post("/v2/models/demo/infer", json=infer_body).json()["outputs"][0]["data"] == [expected]
    with server.client.stream(
        "POST", "/v2/models/demo/generate_stream", json={"text_input": PROMPT, "parameters": GREEDY}
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert "".join(json.loads(line)["text_output"] for line in lines) == expected
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/openai/v1", api_key="none", max_retries=0)
    assert client.completions.create(model="demo", prompt=PROMPT, **GREEDY).choices[0].text == expected
    events = client.completions.create(model="demo", prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in events) == expected


def test_a_seeded_request_is_repeated_exactly(server: ServerProcess) -> None:
    answers = {generate(server, max_tokens=16, temperature=1.0, seed=5).json()["text_output"] for _ in range(3)}
    assert len(answers) == 1


def test_a_client_that_leaves_frees_the_engine(server: ServerProcess) -> None:
    content = json.dumps({"text_input": PROMPT, "parameters": {"max_tokens": 400, "ignore_eos": True}}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v2/models/demo/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    wait_until(lambda: server.client.get("/health").json()["running"] > 0)
    connection.close()
    wait_until(lambda: server.client.get("/health").json()["running"] == 0)
    metrics = server.client.get("/metrics").text
    assert 'pagoda_request_aborts_total{cause="client",model_name="demo"} 1.0' in metrics


def num_requests(server: ServerProcess) -> int:
    health = server.client.get("/health").json()
    return health["running"] + health["waiting"]


def in_background(call: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def test_sigterm_lets_running_requests_end_and_exits_with_0() -> None:
    with ServerProcess() as server:
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/health").json()["state"] == "starting"
        server.wait_until_ready()
        thread, answers = in_background(lambda: generate(server, max_tokens=300, ignore_eos=True))
        wait_until(lambda: server.client.get("/health").json()["running"] == 1)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert server.client.get("/v2/health/live").status_code == 200
        assert generate(server, max_tokens=1).status_code == 503
        thread.join(30)
        assert answers[0].json()["num_output_tokens"] == 300
        assert server.wait() == 0


def test_a_second_signal_ends_what_still_runs() -> None:
    with ServerProcess(grace_period_seconds=300, max_num_seqs=1) as server:
        server.wait_until_ready()
        slow = {"max_tokens": 450, "ignore_eos": True}
        bodies = {"text_input": PROMPT, "parameters": slow}
        threads = [
            in_background(
                lambda: httpx.post(f"{server.client.base_url}/v2/models/demo/generate", json=bodies, timeout=60)
            )
            for _ in range(8)
        ]
        wait_until(lambda: num_requests(server) == len(threads))
        server.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        for thread, answers in threads:
            thread.join(10)
            assert answers[0].status_code in (200, 503)
        assert any(answers[0].status_code == 503 for _, answers in threads)


def test_a_server_that_loses_its_engine_says_so_and_exits_with_1_if_told_to() -> None:
    with ServerProcess(on_engine_failure="exit") as server:
        server.wait_until_ready()
        thread, answers = in_background(lambda: generate(server, max_tokens=450, ignore_eos=True))
        wait_until(lambda: server.client.get("/health").json()["running"] == 1)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.wait() == 1
        thread.join(10)
        assert answers[0].status_code == 503
        assert "SIGKILL" in answers[0].json()["error"]


def test_a_server_that_loses_its_engine_is_unready_until_the_next_one_is_up() -> None:
    with ServerProcess() as server:
        server.wait_until_ready()
        text = generate(server, **GREEDY).json()["text_output"]
        thread, answers = in_background(lambda: generate(server, max_tokens=450, ignore_eos=True))
        wait_until(lambda: server.client.get("/health").json()["running"] == 1)
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_until(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert server.client.get("/v2/health/live").status_code == 200
        refused = generate(server, **GREEDY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        server.wait_until_ready()
        thread.join(60)
        assert answers[0].status_code == 200, "it goes on in the next engine"
        assert generate(server, **GREEDY).json()["text_output"] == text


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server_with_a_sentence(tmp_path: Path) -> None:
    model = shutil.copytree(shared_checkpoint(), tmp_path / "model")
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)  # what its small files say is right
    with ServerProcess(model=model) as server:
        assert server.wait() == 1
        assert len(re.findall(r"model\.safetensors", server.log)) == 1


def test_sigterm_while_loading_exits_with_0() -> None:
    with ServerProcess() as server:
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_taken_port_is_an_error_before_anything_loads(server: ServerProcess) -> None:
    with pytest.raises(AssertionError, match="cannot listen on"), ServerProcess(http_port=server.port):
        pass
