"""A real `pagoda serve` that tells what a request cost it: how long its event loop stood still, and its peak of memory.

A heartbeat on the loop, every few milliseconds, sees how late it comes. What counts of that is what this process did: the
time for which the loop's thread waited for a core (others had the machine) is taken off, and no more is left than the
processor time that all threads of this process took meanwhile. So a thread that keeps the interpreter lock counts, and
another process does not. Memory is the kernel's high-water mark of resident memory, set back before the request.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which would hide modules of the same names
else:
    from tests.support.server import ServerProcess

BEAT_SECONDS = 0.003
REST_SECONDS = 0.02
"""From the answer until the cost is read: the loop may still be busy with the request's end."""
CLEAR_PEAK = "5"


@dataclass
class Cost:
    """Of what was done in the block: seconds that the loop stood still at a time, and bytes beyond those held before."""

    stall: float = 0.0
    memory: int = 0


class Heartbeat:
    """Runs on the loop of the server."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._stat: Any = None
        self._timer: Any = None
        self.worst = 0.0
        self._seen = (0.0, 0.0, 0.0)
        loop.call_soon(self._start)

    def stop(self) -> None:
        """End it."""
        self._timer.cancel()
        os.close(self._stat)

    def reset(self) -> None:
        """Forget what was."""
        self.worst = 0.0

    def _start(self) -> None:
        self._stat = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._seen = self._clocks()
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def _beat(self) -> None:
        clocks = self._clocks()
        wall, waited, worked = (now - then for now, then in zip(clocks, self._seen, strict=True))
        self._seen = clocks
        self.worst = max(self.worst, min(wall - BEAT_SECONDS - waited, worked))
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def _clocks(self) -> tuple[float, float, float]:
        """Wall time, time this thread waited for a core, processor time of all threads."""
        waited = int(os.pread(self._stat, 100, 0).split()[1]) / 1e9
        return time.monotonic(), waited, time.process_time()


def _serve(path: str, arguments: list[str]) -> int:
    import uvloop

    from pagoda.cli.main import main

    new_event_loop = uvloop.new_event_loop

    def beating_loop() -> Any:
        loop = new_event_loop()
        threading.Thread(target=_answer, args=(path, Heartbeat(loop)), daemon=True).start()
        return loop

    uvloop.new_event_loop = beating_loop
    return main(["serve", *arguments])


def _answer(path: str, heartbeat: Heartbeat) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    trim = ctypes.CDLL(None).malloc_trim
    with listener.accept()[0].makefile("rw") as control:
        while line := control.readline():
            if line.strip() == "begin":
                gc.collect()
                trim(0)
                Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
                before = _memory("VmRSS")
                time.sleep(2 * BEAT_SECONDS)
                heartbeat.reset()
                control.write("\n")
            else:
                control.write(json.dumps({"stall": heartbeat.worst, "memory": _memory("VmHWM") - before}) + "\n")
            control.flush()


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], sys.argv[2:]))


class MeasuredServer(ServerProcess):
    """A `ServerProcess` with `measured`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._directory = tempfile.TemporaryDirectory()
        self._path = f"{self._directory.name}/control"
        serve = self._command.index("serve")
        self._command = [sys.executable, __file__, self._path, *self._command[serve + 1 :]]

    def __enter__(self) -> MeasuredServer:
        super().__enter__()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self._path)
        self._control = self._socket.makefile("rw")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.close()
        self._socket.close()
        super().__exit__(kind, error, trace)
        self._directory.cleanup()

    @contextmanager
    def measured(self) -> Iterator[Cost]:
        """The cost of the block, known when it is left."""
        cost = Cost()
        self._ask("begin")
        yield cost
        time.sleep(REST_SECONDS)
        found = json.loads(self._ask("end"))
        cost.stall, cost.memory = found["stall"], found["memory"]

    def _ask(self, what: str) -> str:
        self._control.write(what + "\n")
        self._control.flush()
        return self._control.readline()
