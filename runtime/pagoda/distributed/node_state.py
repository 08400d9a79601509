"""What runs on a worker node, in small files that the node's probes read: the node's own state, and one of each rank there.

    <directory>/node.json      written by `pagoda join`
    <directory>/rank-3.json    written by rank 3

A file holds a phase, the time of the last heartbeat, and the process that writes it: without that process the file
is ignored. Imports the standard library only, for a probe has a fraction of a second.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagoda.distributed.private_directory import default_directory, make_private

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "PAGODA_NODE_STATE_DIRECTORY"
"""Set by `pagoda join` for everything that it starts; where it is not set, ranks publish nothing."""

READY = "ready"
JOINED = "joined"

_NODE = "node"
_START_TIME_FIELD = 19  # of /proc/PID/stat, counted from the field after the command's name


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedState:
    """`name`: `node` or `rank 3`. `heartbeat`: `time.monotonic()` of the last one; it may be `timeout` seconds old."""

    name: str
    phase: str
    detail: str
    heartbeat: float
    timeout: float
    pid: int
    process_start: int

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last heartbeat."""
        return time.monotonic() - self.heartbeat

    def __str__(self) -> str:
        return f"{self.name} {self.phase}" + (f", {self.detail}" if self.detail else "")


class StateFile:
    """The file of the calling process, for all its threads. `timeout`: seconds until a heartbeat is overdue."""

    def __init__(self, directory: Path, name: str, timeout: float) -> None:
        self._path = directory / f"{name.replace(' ', '-')}.json"
        self._name = name
        self._timeout = timeout
        self._phase = "starting"
        self._detail = ""
        self._lock = threading.Lock()
        self._process_start = process_start(os.getpid()) or 0

    def enter(self, phase: str, detail: str = "") -> None:
        """Say that the process is at `phase` now."""
        self._phase, self._detail = phase, detail
        self.beat()

    def beat(self) -> None:
        """Write a heartbeat."""
        state = PublishedState(
            name=self._name,
            phase=self._phase,
            detail=self._detail,
            heartbeat=time.monotonic(),
            timeout=self._timeout,
            pid=os.getpid(),
            process_start=self._process_start,
        )
        unfinished = self._path.with_suffix(f".{os.getpid()}")
        try:
            with self._lock:
                unfinished.write_text(json.dumps(asdict(state)), encoding="utf-8")
                unfinished.replace(self._path)  # a reader sees the state before or this one, never half of it
        except OSError as error:
            # The probes will miss the heartbeat; the work of this process does not depend on them.
            logger.warning("the state of %s could not be published: %s", self._name, error)


def prepare_directory(directory: Path) -> None:
    """Make the directory, for this user only, and clear what an earlier process left there.

    Raises `ConfigError` for the default one if another user made it.
    """
    if directory == default_directory():
        make_private(directory)
    else:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in directory.glob("*.json"):
        path.unlink(missing_ok=True)


def published(directory: Path) -> tuple[PublishedState | None, list[PublishedState]]:
    """The node's state and that of its ranks, as far as their processes exist."""
    states = {state.name: state for state in _read_all(directory) if _is_there(state)}
    node = states.pop(_NODE, None)
    return node, sorted(states.values(), key=lambda state: state.name)


def evaluate_probe(probe: str, node: PublishedState | None, ranks: list[PublishedState]) -> tuple[bool, str]:
    """Whether `probe` passes on a worker node, and why.

    startup  passes once the node belongs to the cluster
    ready    passes while it does, has ranks, and all of them are ready
    live     fails when only a restart can help: no heartbeat of `pagoda join`, or of a rank that exists
    """
    if node is None:
        return False, "no `pagoda join` runs on this node"
    overdue = [state for state in (node, *ranks) if state.silent_seconds > state.timeout]
    if overdue:
        worst = overdue[0]
        return False, f"{worst}: no heartbeat for {worst.silent_seconds:.1f} s (timeout {worst.timeout:g} s)"
    words = "; ".join(map(str, (node, *ranks)))
    if probe == "live":
        return True, words
    if node.phase != JOINED:
        return False, words
    if probe == "startup":
        return True, words
    if not ranks:
        return False, f"{words}; no rank runs here"
    return all(state.phase == READY for state in ranks), words


def node_file(directory: Path, timeout: float) -> StateFile:
    """The file of the node itself."""
    return StateFile(directory, _NODE, timeout)


def rank_file(directory: Path, rank: int, timeout: float) -> StateFile:
    """The file of a rank."""
    return StateFile(directory, f"rank {rank}", timeout)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id that runs, or could."""
    return process_start(pid) is not None


def _read_all(directory: Path) -> Iterator[PublishedState]:
    for path in directory.glob("*.json"):
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            yield PublishedState(**fields)
        except (OSError, ValueError, TypeError):
            continue  # it was removed meanwhile, or is not ours


def _is_there(state: PublishedState) -> bool:
    return state.process_start != 0 and process_start(state.pid) == state.process_start


def process_start(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; with its id that names a process for good. None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[_START_TIME_FIELD])
