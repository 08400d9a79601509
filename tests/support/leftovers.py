"""A pytest plugin: what a module of tests leaves behind is a failure that names it, and is removed for those that follow.

    processes     children, theirs, and orphans of theirs: found by an environment variable that all of them inherit
    sockets       that listen in this process
    threads       of this process that are no daemons: the interpreter would wait for them
    files         in the temporary directory, which is this process's own; in /dev/shm, if no process has them mapped; and
                  `pagoda-*` in the system's temporary directory

Every worker of a parallel run has its own variable and its own directory. /dev/shm and the system's temporary directory belong
to all of them: a file there may be of a module that ran beside the one that is blamed.
"""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

GRACE_SECONDS = 10.0
"""A process that was told to end is still there for a while, the more so on a busy machine."""
LOOK_SECONDS = 0.05
RUN_DIRECTORY = "TEST_RUN_DIRECTORY"
"""The directory of this process, and the mark of what it starts; those of processes that run tests for it are in it."""
SHARED_DIRECTORY = "TEST_SHARED_DIRECTORY"
"""A directory of the whole run, for what all its processes may read."""
SYSTEM_DIRECTORY = "PYTEST_DEBUG_TEMPROOT"
"""The system's temporary directory. The name is pytest's: its own directories stay there, where they outlive the run."""
SHARED_MEMORY = Path("/dev/shm")
CACHES = ("torchinductor_",)
"""Beginnings of names that libraries give to what they keep in the temporary directory for as long as the process lives."""

_OWN = pytest.StashKey[tuple[tempfile.TemporaryDirectory[str], dict[str, str | None]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give this process a temporary directory and a mark of its own; what it starts inherits both."""
    variables = (RUN_DIRECTORY, SHARED_DIRECTORY, SYSTEM_DIRECTORY, "TMPDIR")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.setdefault(SYSTEM_DIRECTORY, tempfile.gettempdir())
    parent = os.environ.get(RUN_DIRECTORY)
    directory = tempfile.TemporaryDirectory(
        prefix="pagoda-tests-" if parent is None else "",
        dir=parent or tempfile.gettempdir(),
        ignore_cleanup_errors=True,
    )
    config.stash[_OWN] = directory, before
    own = Path(directory.name)
    for name in ("tmp", "shared"):
        (own / name).mkdir()
    os.environ[RUN_DIRECTORY] = str(own)
    os.environ.setdefault(SHARED_DIRECTORY, str(own / "shared"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(own / "tmp")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the directory."""
    directory, before = config.stash[_OWN]
    directory.cleanup()
    tempfile.tempdir = None
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def no_leftovers() -> Iterator[None]:
    """Fail the last test of a module that leaves something behind."""
    before = take_snapshot()
    yield
    left = wait_for_end(before)
    if left:
        left.remove()
        pytest.fail(f"this module left behind:\n{left}", pytrace=False)


@dataclass
class Snapshot:
    """What there is at a moment, by what tells one from another; the values are for people."""

    processes: dict[psutil.Process, str] = field(default_factory=dict)
    sockets: dict[tuple[int, object], str] = field(default_factory=dict)
    threads: dict[threading.Thread, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.processes or self.sockets or self.threads or self.files)

    def __str__(self) -> str:
        kinds = (self.processes, self.sockets, self.threads, self.files)
        return "\n".join(f"  {text}" for kind in kinds for text in kind.values())

    def since(self, before: Snapshot) -> Snapshot:
        """What was not there before."""
        return Snapshot(
            {key: text for key, text in self.processes.items() if key not in before.processes},
            {key: text for key, text in self.sockets.items() if key not in before.sockets},
            {key: text for key, text in self.threads.items() if key not in before.threads},
            _unmapped({key: text for key, text in self.files.items() if key not in before.files}),
        )

    def remove(self) -> None:
        """End the processes and remove the files; a thread and a socket stay until this process ends."""
        for process in self.processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.processes, timeout=GRACE_SECONDS)
        for path in self.files:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def take_snapshot() -> Snapshot:
    """What there is now."""
    return Snapshot(_processes(), _listening_sockets(), _threads(), _files())


def wait_for_end(before: Snapshot) -> Snapshot:
    """What is still there that was not there before, after the time that it may take to end."""
    deadline = time.monotonic() + GRACE_SECONDS
    if left := take_snapshot().since(before):
        gc.collect()  # a socket in a cycle of references is closed with it
    while left and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        left = take_snapshot().since(before)
    return left


def _processes() -> dict[psutil.Process, str]:
    own = Path(os.environ[RUN_DIRECTORY])
    this = psutil.Process()
    helpers = {this.pid, multiprocessing.resource_tracker._resource_tracker._pid}  # type: ignore[attr-defined]
    found = dict.fromkeys(this.children(recursive=True), "")
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mark = Path(process.environ().get(RUN_DIRECTORY, "/"))
            if mark == own or own in mark.parents:
                found[process] = ""
    for process in list(found):
        with suppress(psutil.Error):
            if process.pid not in helpers and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = f"process {process.pid}: {' '.join(process.cmdline()) or process.name()}"
    return {process: text for process, text in found.items() if text}


def _listening_sockets() -> dict[tuple[int, object], str]:
    return {
        (connection.fd, connection.laddr): f"listening socket on {connection.laddr.ip}:{connection.laddr.port}"
        for connection in psutil.Process().connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def _threads() -> dict[threading.Thread, str]:
    return {
        thread: f"thread {thread.name!r}, which is no daemon"
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread()
    }


def _files() -> dict[Path, str]:
    system, own = Path(os.environ[SYSTEM_DIRECTORY]), Path(tempfile.gettempdir())
    found = [path for path in system.glob("pagoda-*") if not path.name.startswith("pagoda-tests-")]
    found += [path for path in own.iterdir() if not path.name.startswith(CACHES)]
    if SHARED_MEMORY.is_dir():
        found += SHARED_MEMORY.iterdir()
    return {path: f"file {path}" for path in found}


def _unmapped(files: dict[Path, str]) -> dict[Path, str]:
    """Without the shared memory of a process that is there: it ends with that process, which may be another worker's."""
    if not any(path.is_relative_to(SHARED_MEMORY) for path in files):
        return files
    mapped: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mapped |= {region.path for region in process.memory_maps() if region.path.startswith(str(SHARED_MEMORY))}
    return {path: text for path, text in files.items() if str(path) not in mapped}
