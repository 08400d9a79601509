"""`pagoda serve` at a terminal: a bar while it loads, then what is served and where; and plain lines elsewhere."""

from __future__ import annotations

import re

import httpx

from tests.support.checkpoints import shared_checkpoint
from tests.support.server import ServerProcess
from tests.support.terminal import Terminal


def test_serve_greets_at_a_terminal_and_ends_with_ctrl_c() -> None:
    settings = ["--host=127.0.0.1", "--http-port=0", "--grpc-port=0", "--kv-cache-memory-bytes=32MiB", "--threads=1"]
    with Terminal(["serve", str(shared_checkpoint()), "--served-model-name=qwen", *settings]) as terminal:
        starting = terminal.wait_for("is ready. Ctrl-C stops it.")
        assert "starting qwen" in starting
        assert " INFO " not in starting
        shown = terminal.wait_for("/docs")
        assert "cpu, " in shown
        assert "KV cache" in shown
        url = re.search(r"REST\S* *(\S*?)\r", shown)
        assert url is not None, shown
        address = re.sub(r"\x1b\[[0-9;]*m", "", url[1])
        assert httpx.get(f"{address}/v2/health/ready", trust_env=False).status_code == 200
        assert httpx.get(f"{address}/v1/models", trust_env=False).json()["data"][0]["id"] == "qwen"
        assert "GET /v1/models" in terminal.wait_for("200")
        terminal.seen = ""
        terminal.process.send_signal(2)
        assert terminal.process.wait(30) == 0


def test_elsewhere_there_are_plain_lines_only() -> None:
    with ServerProcess() as server:
        server.wait_until_ready()
        assert "\x1b" not in server.log
        assert "is ready: KV cache" in server.log
