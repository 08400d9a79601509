"""The container of KServe's LLMInferenceService, run in a shell as the kubelet runs it, with Pagoda's `vllm`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import zmq

from pagoda.models.checkpoint_source import demo_checkpoint
from tests.support.llmisvc_preset import DATA_PARALLEL, DISAGGREGATED, OFFLOADING, PIPELINE_PARALLEL, Preset, adapters
from tests.support.lora_adapters import write_adapter
from tests.support.ports import free_port
from tests.support.tls import write_self_signed_certificate

NAME = "Qwen/Qwen3-0.6B"
SMALL = "--max-model-len 512 --max-num-seqs 4 --kv-cache-memory-bytes 16M --dtype float32 --block-size 64"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the container: `vllm` on the path, and a home that can be written."""
    directory = tmp_path_factory.mktemp("image")
    command = directory / "vllm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pagoda.cli.vllm "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "HOME": str(directory),
        "HF_HUB_CACHE": str(directory / "models"),
        "VLLM_LOGGING_LEVEL": "INFO",
        "PAGODA_HOST": "127.0.0.1",
        "PAGODA_GRPC_PORT": "0",
        "PAGODA_THREADS": "1",
        "POD_IP": "10.0.0.7",
    }


@contextmanager
def container(command: list[str], environ: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def test_the_preset_with_certificates_prefix_routing_and_the_users_own_arguments(
    image: dict[str, str], tmp_path: Path
) -> None:
    write_self_signed_certificate(tmp_path, "qwen")
    port, events = free_port(), free_port()
    sql = write_adapter(tmp_path / "sql", Path(demo_checkpoint()), rank=64)
    preset = Preset(
        name=NAME,
        namespace="team",
        models=str(demo_checkpoint()),
        port=port,
        tls=str(tmp_path),
        topology=adapters(str(sql)),
    )
    config = f'{{"enable_kv_cache_events":true,"endpoint":"tcp://127.0.0.1:{events}","topic":"kv@${{POD_IP}}@{NAME}"}}'
    environ = {
        **image,
        "VLLM_ADDITIONAL_ARGS": f"--prefix-caching-hash-algo sha256_cbor {SMALL} --kv-events-config '{config}'",
    }
    log = tmp_path / "log"
    context = zmq.Context()
    picker = context.socket(zmq.SUB)
    picker.bind(f"tcp://127.0.0.1:{events}")
    picker.subscribe(b"kv@")
    try:
        with (
            container(preset.command("--scheduling-policy", "priority"), environ, log) as process,
            httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, timeout=60) as client,
        ):
            wait_until_ready(client, process, log)
            picker.poll(200)  # a socket subscribes at its peers while it reads
            names = {model["id"] for model in client.get("/v1/models").json()["data"]}
            assert names == {NAME, f"publishers/team/models/{NAME}", "sql"}
            for name in names:
                body = {"model": name, "messages": [{"role": "user", "content": "Who are you? " * 20}], "max_tokens": 8}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] > 0
            assert "vllm:num_requests_waiting" in client.get("/metrics").text
            assert picker.poll(20_000), "no KV event came"
            assert picker.recv_multipart()[0] == f"kv@10.0.0.7@{NAME}".encode()
            process.send_signal(signal.SIGTERM)  # the shell has given its place to the server
            assert process.wait(30) == 0, log.read_text()
    finally:
        context.destroy(linger=0)
    text = log.read_text()
    assert "/v1/chat/completions" in text
    assert "GET /health" not in text
    assert "--prefix-caching-hash-algo has no effect" in text


REFUSED = {
    "several nodes, data parallel": (
        {"topology": DATA_PARALLEL},
        ["--data-parallel-size-local", "ranks of several machines are a Ray cluster"],
    ),
    "several nodes, pipeline parallel": (
        {"topology": PIPELINE_PARALLEL},
        ["--nnodes", "ranks of several machines are a Ray cluster"],
    ),
    "disaggregation": (
        {"topology": DISAGGREGATED},
        ["--kv-transfer-config", "prefill and decode are not disaggregated"],
    ),
    "offloading": ({"kv_transfer": OFFLOADING}, ["--kv-transfer-config", "is neither offloaded"]),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_there_is_refused_by_name(
    changes: dict[str, str], named: list[str], image: dict[str, str], tmp_path: Path
) -> None:
    preset = Preset(name="qwen", namespace="team", models=str(tmp_path), port=8000, **changes)
    ended = subprocess.run(preset.command(), capture_output=True, text=True, env=image, timeout=60, check=False)
    assert ended.returncode == 2
    assert all(part in ended.stderr for part in named), ended.stderr
