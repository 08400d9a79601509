"""A worker process: started, asked, stopped while it is not its turn, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from harness.checkpoints import HERE, python_of
from harness.engine import EngineSettings
from harness.measure import Case

RUN_SECONDS = 300.0
LOAD_SECONDS = 1800.0
TAIL_LINES = 5


class WorkerFailedError(Exception):
    """The worker, or one run of it, failed; the text says how, with the last lines that it wrote."""


class Worker:
    """An engine in a process bound to `cores`. It is stopped (SIGSTOP) except while it loads or runs a case.

    A stopped process takes no processor time: pools that spin and threads that poll cannot slow the others down.
    """

    def __init__(self, engine: str, settings: EngineSettings, cores: list[int], log: Path) -> None:
        self.engine = engine
        self.versions: dict[str, str] = {}
        self.load_seconds = 0.0
        self.peak_rss_bytes = 0
        self._log = log
        threads = str(settings.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        name = engine.partition("-")[0]
        plain = {field: getattr(settings, field) for field in EngineSettings.__dataclass_fields__}
        bound = ["taskset", "--cpu-list", ",".join(map(str, cores))]
        command = [*bound, str(python_of(name)), str(HERE / "worker.py"), name, json.dumps(plain)]
        self._began = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    @property
    def process_id(self) -> int:
        """Of the worker."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return once it is loaded. Raises `WorkerFailedError`, also where the engine says that it is not possible here."""
        content = self._read(LOAD_SECONDS)
        self.load_seconds = time.perf_counter() - self._began
        if "not_possible" in content:
            self.end()
            raise WorkerFailedError(content["not_possible"])
        self.versions = content["ready"]["versions"]
        self._signal(signal.SIGSTOP)

    def run(self, case: Case) -> dict[str, Any]:
        """One run of `case`; its figures. Raises `WorkerFailedError`."""
        self._signal(signal.SIGCONT)
        try:
            self._write({"run": case.as_json()})
            content = self._read(RUN_SECONDS)
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in content:
            raise WorkerFailedError(content["error"])
        result: dict[str, Any] = content["result"]
        self.peak_rss_bytes = result.pop("peak_rss_bytes")
        return result

    def end(self) -> None:
        """End the process and wait for it."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            try:
                self._write({"quit": True})
                self._process.wait(20)
            except (WorkerFailedError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _write(self, content: dict[str, Any]) -> None:
        assert self._process.stdin is not None, "it was made with a pipe"
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerFailedError(self._last_words()) from error

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next answer; a worker that gives none in time is killed."""
        assert self._process.stdout is not None, "it was made with a pipe"
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerFailedError(self._last_words())
        content: dict[str, Any] = json.loads(line)
        return content

    def _last_words(self) -> str:
        status = self._process.wait()
        with self._log.open(errors="replace") as lines:
            tail = " | ".join(line.strip() for line in deque(lines, TAIL_LINES))
        return f"the worker ended with status {status}: {tail}"
