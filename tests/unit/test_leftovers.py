"""The check of what a module of tests leaves behind: each kind is named, once, and gone for the next module."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_until

CONFTEST = """
from pathlib import Path

import pytest

pytest_plugins = ["tests.support.leftovers"]


def pytest_configure():
    from tests.support import leftovers

    leftovers.GRACE_SECONDS = 0.5
    leftovers.others_are_at_work = lambda: False


@pytest.fixture
def note(request):
    return Path(__file__).with_name(request.node.path.stem).write_text
"""
# By what each leaves; what it notes is asked for afterwards.
MODULES = {
    "child": """
import subprocess

def test(note):
    note(str(subprocess.Popen(["sleep", "600"]).pid))
""",
    "orphan": """
import subprocess, sys

PARENT = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"

def test(note):
    note(subprocess.check_output([sys.executable, "-c", PARENT], text=True).strip())
""",
    "socket": """
import socket

sockets = []

def test(note):
    sockets.append(socket.create_server(("127.0.0.1", 0)))
    note(str(sockets[0].getsockname()[1]))
""",
    "thread": """
import threading, time

def test(note):
    threading.Thread(target=time.sleep, args=(5,), name="worker-7").start()
    note("worker-7")
""",
    "file": """
import tempfile

def test(note):
    note(tempfile.mkdtemp())
""",
    "shm": """
import tempfile

def test(note):
    note(tempfile.mkstemp(dir="/dev/shm")[1])
""",
    "clean": """
import socket, subprocess, tempfile, threading

def test():
    subprocess.run(["sleep", "0"], check=True)
    socket.create_server(("127.0.0.1", 0)).close()
    threading.Thread(target=print).start()
    tempfile.TemporaryDirectory().cleanup()
""",
}


@dataclass(frozen=True)
class Run:
    """What a run of these modules said, and what each of them noted."""

    report: str
    directory: Path

    def noted(self, kind: str) -> str:
        return (self.directory / f"test_{kind}").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("modules")
    (directory / "conftest.py").write_text(CONFTEST)
    for kind, text in MODULES.items():
        (directory / f"test_{kind}.py").write_text(text)
    environ = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    # Each error once: the short summary repeats it in full where the variable CI is set.
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environ, timeout=150)
    return Run(done.stdout, directory)


def test_only_modules_that_leave_something_fail_and_their_tests_have_passed(run: Run) -> None:
    assert f"{len(MODULES)} passed, {len(MODULES) - 1} errors" in run.report
    assert run.report.count("ERROR at teardown of test") == len(MODULES) - 1
    assert run.report.count("this module left behind:") == len(MODULES) - 1


def sleeps(pid: int) -> bool:
    """Whether the process is there. A number may come again, and init may reap an orphan late."""
    try:
        return psutil.Process(pid).cmdline() == ["sleep", "600"]
    except psutil.Error:
        return False


@pytest.mark.parametrize("kind", ["child", "orphan"])
def test_a_process_is_named_and_killed(run: Run, kind: str) -> None:
    pid = run.noted(kind)
    assert run.report.count(f"this module left behind:\n  process {pid}: sleep 600\n") == 1
    wait_until(lambda: not sleeps(int(pid)))


def test_a_socket_that_listens_is_named(run: Run) -> None:
    named = f"this module left behind:\n  listening socket on 127.0.0.1:{run.noted('socket')}\n"
    assert run.report.count(named) == 1


def test_a_thread_is_named(run: Run) -> None:
    assert run.report.count("this module left behind:\n  thread 'worker-7', which is no daemon\n") == 1


@pytest.mark.parametrize("kind", ["file", "shm"])
def test_a_file_is_named_and_removed(run: Run, kind: str) -> None:
    path = run.noted(kind)
    assert run.report.count(f"this module left behind:\n  file {path}\n") == 1
    assert not Path(path).exists()
