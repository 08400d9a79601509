"""A server's own Ray head, with a stand-in for `ray start`: found again, outlives who started it, ends with its owner."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagoda.distributed.ray import head as ray_head
from pagoda.distributed.ray.head import ensure_head, last_error
from pagoda.distributed.ray.node import RayNode
from pagoda.errors import CommunicationError, ConfigError
from tests.support.ports import free_port
from tests.support.waiting import wait_until

HEAD = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("Ray runtime started.", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process for whose sake a head runs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # where the head makes a token
    monkeypatch.setattr("tempfile.tempdir", None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as process:
        yield process
        process.kill()


def node(monkeypatch: pytest.MonkeyPatch, script: str) -> RayNode:
    port = free_port()
    monkeypatch.setattr(RayNode, "command", lambda self: [sys.executable, "-c", script, str(port)])
    return RayNode(address="127.0.0.1", head_port=port)


def soon() -> float:
    return time.monotonic() + 60


def here() -> str:
    return "127.0.0.1"


def nothing(words: str) -> None:
    pass


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def test_a_head_is_started_once_and_ends_with_its_owner(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = node(monkeypatch, HEAD)
    address = ensure_head(owner.pid, head, here, soon(), nothing)
    assert address == f"127.0.0.1:{head.head_port}"
    assert ensure_head(owner.pid, head, here, soon(), nothing) == address
    owner.kill()
    owner.wait()
    wait_until(lambda: not listens(address))


def test_a_head_that_is_lost_is_started_again_where_it_was(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    head = node(monkeypatch, f"import os; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n{HEAD}")
    address = ensure_head(owner.pid, head, here, soon(), nothing)
    os.kill(int(pids.read_text()), signal.SIGKILL)
    wait_until(lambda: not listens(address))
    # What is chosen by now is another address, for this one's interface was down for a while.
    assert ensure_head(owner.pid, head, lambda: "127.0.0.9", soon(), nothing) == address
    assert len(pids.read_text().split()) == 2


def test_replicas_that_start_at_once_share_a_head(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = node(monkeypatch, HEAD)
    with ThreadPoolExecutor(3) as pool:
        addresses = list(pool.map(lambda _: ensure_head(owner.pid, head, here, soon(), nothing), range(3)))
    assert set(addresses) == {f"127.0.0.1:{head.head_port}"}


def test_a_taken_port_says_how_to_use_the_head_that_is_there(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = node(monkeypatch, HEAD)
    with (
        socket.create_server((head.address, head.head_port or 0)),
        pytest.raises(ConfigError, match=f"to use a head that runs there set ray_address=127.0.0.1:{head.head_port}"),
    ):
        ensure_head(owner.pid, head, here, soon(), nothing)


def test_a_head_that_fails_is_tried_again_and_given_up_with_its_words(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Path(os.environ["TMPDIR"]) / "tries"
    script = f"import sys; open({str(tries)!r}, 'a').write('x'); sys.exit('RuntimeError: no room in /dev/shm')"
    head = node(monkeypatch, script)
    with pytest.raises(CommunicationError, match="did not start: RuntimeError: no room in /dev/shm"):
        ensure_head(owner.pid, head, here, soon(), nothing)
    assert len(tries.read_text()) == ray_head._MAX_FAILURES


def test_a_head_that_hangs_is_given_up_in_time(owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    head = node(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(CommunicationError, match="did not start in time"):
        ensure_head(owner.pid, head, here, time.monotonic() + 1, said.append)
    assert said[0].startswith("starting a Ray head at 127.0.0.1:")


def test_the_last_error_is_the_last_line_with_an_error_in_it() -> None:
    assert last_error("starting\n  ValueError: bad port\nTo see more, look there\n") == "ValueError: bad port"
    assert last_error("starting\nended\n") == "ended"
    assert last_error("") == "no output"
