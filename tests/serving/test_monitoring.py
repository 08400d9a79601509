"""`pagoda why` and `pagoda report` about a real engine: stopped, and at work."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from pagoda.cli.report import run as report
from pagoda.cli.why import run as why
from pagoda.errors import ConfigError
from pagoda.monitoring.server import Server, SilentError, look
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(engine_stall_timeout_seconds=60) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def url(server: ServerProcess) -> str:
    return f"http://127.0.0.1:{server.port}"


def ask(url: str, max_tokens: int = 3) -> None:
    httpx.post(
        f"{url}/v1/completions", json={"prompt": "a b c", "max_tokens": max_tokens, "ignore_eos": True}, timeout=60
    )


def test_a_report_of_an_engine_at_work(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    is_over = threading.Event()

    def load() -> None:
        while not is_over.is_set():
            ask(url, 30)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        where = ["--base-url", url, "--seconds", "1", "--slo", "ttft:100000", "tpot:1000"]
        assert report([*where, "--out", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]) == 0
    finally:
        is_over.set()
        thread.join(60)
    assert "things to change" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    (model,) = found["models"]
    assert model["limits"]["num_parameters"] > 0
    assert model["limits"]["weight_bytes"] > 2 * model["limits"]["num_parameters"]
    assert set(model["steps"]["kinds"]) == {"prefill", "decode"}
    decode = model["steps"]["kinds"]["decode"]
    assert (decode["rows"], decode["tokens"], decode["new"]) == (1.0, 1.0, 1.0)
    assert 0 < decode["roof_share"] <= 1.0001
    assert len(model["steps"]["roofline"]["points"]) > 0
    assert sum(model["steps"]["blocks"].values()) == model["limits"]["num_blocks"]
    assert model["goodput"]["share"] == 1.0
    assert model["latencies"]["ttft"]["count"] >= 1
    assert found["system"]["cpu"]["usable_cores"] >= 1
    assert found["settings"]["max_num_seqs"]["source"] == "default"
    page = (tmp_path / "r.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<svg") >= 5
    with pytest.raises(ConfigError, match="own machine"):
        report(["--base-url", "http://elsewhere.example:1", "--measure"])


def test_an_engine_that_is_stopped_is_found_with_its_process(
    server: ServerProcess, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    request = threading.Thread(target=ask, args=(url,))
    try:
        request.start()
        wait_until(lambda: server.client.get("/health").json()["seconds_since_progress"] > 2.1)
        assert why(["--base-url", url, "--seconds", "0"]) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    request.join(30)
    out = capsys.readouterr().out
    assert f"pid {pid}: stopped" in out
    assert f"kill -CONT {pid}" in out
    assert "its engine core makes no progress" in out
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(SilentError):
            look(Server(url, timeout=0.3))
    finally:
        server.process.send_signal(signal.SIGCONT)
