"""A real `pagoda serve` in a process of its own, on free ports, with a checkpoint of random weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.checkpoints import shared_checkpoint

START_SECONDS = 120.0


class ServerProcess:
    """`pagoda serve --model ... OPTIONS`; use as a context, which waits until it listens and kills it in the end.

    `port` and `grpc_port` are known from then on; `wait_until_ready()` waits for the model. Settings are keyword arguments:
    `max_num_seqs=4`.
    """

    def __init__(self, *, model: Path | None = None, model_name: str = "demo", **settings: Any) -> None:
        values = {
            "model": model or shared_checkpoint(),
            "model_name": model_name,
            "host": "127.0.0.1",
            "http_port": 0,
            "grpc_port": 0,
            "kv_cache_memory_bytes": "32MiB",
            "threads": 1,
            **settings,
        }
        if "models" in values:  # each with a model of its own
            del values["model"], values["model_name"]
        options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self._command = [sys.executable, "-m", "pagoda.cli.main", "serve", *options]
        self._log_file = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (lives as long as the process)
        self.port = 0
        self.grpc_port = 0

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self._command, stdout=self._log_file, stderr=self._log_file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.port = int(self.wait_for_log(r"REST on https?://\S+:(\d+)"))
        self.grpc_port = int(self.wait_for_log(r"gRPC.* on \S+:(\d+)"))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if error is not None:
            sys.stderr.write(self.log)
        self._log_file.close()

    @property
    def log(self) -> str:
        """What the process has said so far."""
        return Path(self._log_file.name).read_text(errors="replace")

    def wait_for_log(self, pattern: str, seconds: float = START_SECONDS) -> str:
        """The first group of `pattern` (or the match) once it stands in the log."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.log)) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the log has no {pattern!r} (exit status {self.process.poll()}):\n{self.log}")
            time.sleep(0.02)
        return found[1] if found.groups() else found[0]

    def wait_until_ready(self) -> None:
        """Return once the server takes requests."""
        deadline = time.monotonic() + START_SECONDS
        while self.client.get("/v2/health/ready").status_code != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server is not ready:\n{self.log}")
            time.sleep(0.2)

    def engine_pid(self) -> int:
        """Process id of the engine core. The first of them: a spare process for the next one is younger."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        engines = [
            pid for pid in children if b"pagoda.engine.core.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert engines
        return int(engines[0])

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit status."""
        return self.process.wait(seconds)
