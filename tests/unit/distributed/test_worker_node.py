"""`pagoda join` with a stand-in for `ray start`: joining, joining again, and when it gives up."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.config.schema import PagodaConfig
from pagoda.distributed.node_state import JOINED, published
from pagoda.distributed.ray import worker_node
from pagoda.distributed.ray.node import RayNode
from pagoda.distributed.ray.worker_node import WorkerNode
from pagoda.errors import CommunicationError, ConfigError
from tests.support.virtual_time import Clock
from tests.support.waiting import wait_until

STARTED = "print('Ray runtime started.', flush=True)"


@pytest.fixture
def head() -> Iterator[str]:
    """Something that listens where a head would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def ray_that(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(RayNode, "command", lambda self: [sys.executable, "-c", script])
    monkeypatch.setattr(worker_node, "_PAUSE_SECONDS", 0.05)


def worker(
    head: str, directory: Path, seconds: float = 600.0, clock: Callable[[], float] = time.monotonic
) -> WorkerNode:
    config = PagodaConfig(rendezvous_timeout_seconds=seconds)
    return WorkerNode(config, head, RayNode.of(config), directory, clock=clock)


@contextmanager
def running(node: WorkerNode) -> Iterator[None]:
    """The node in a thread, which is told to stop in the end, and does."""
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    yield
    node.stop()
    thread.join(120)
    assert not thread.is_alive()


def test_a_node_joins_says_so_and_leaves_when_told(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_that(monkeypatch, f"import time; {STARTED}; time.sleep(60)")
    with running(worker(head, tmp_path)):
        wait_until(lambda: (state := published(tmp_path)[0]) is not None and state.phase == JOINED)


def test_a_head_that_is_lost_is_joined_again(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    ray_that(
        monkeypatch,
        f"import time; {STARTED}; file = open({str(count)!r}, 'a'); file.write('x'); file.close(); time.sleep(0.6)",
    )
    with running(worker(head, tmp_path / "state")):
        wait_until(lambda: count.exists() and len(count.read_text()) >= 3)


def test_a_head_that_does_not_take_the_node_in_is_tried_again_and_quoted(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_that(monkeypatch, "import sys; sys.exit('ConnectionError: the GCS does not answer')")
    words = f"the Ray head at {head} did not take this node yet: ConnectionError: the GCS does not answer"
    with running(worker(head, tmp_path)):
        wait_until(lambda: (state := published(tmp_path)[0]) is not None and state.detail == words)


def test_a_head_that_never_takes_the_node_in_is_given_up(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_that(monkeypatch, "import time; time.sleep(60)")
    clock, command = Clock(), RayNode.command

    def too_late(node: RayNode) -> list[str]:
        clock.advance(601.0)
        return command(node)

    monkeypatch.setattr(RayNode, "command", too_late)
    with pytest.raises(CommunicationError, match="could not be joined in time: Ray did not come up in the time"):
        worker(head, tmp_path, clock=clock).run()


def test_a_version_conflict_ends_it_at_once(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Version mismatch: The cluster was started with:\\n  Ray: 2.1.0\\n  Python: 3.11.7\\nThis process"
    ray_that(monkeypatch, f"import sys; sys.exit('{text}')")
    with pytest.raises(ConfigError, match=r"runs Ray 2\.1\.0 with Python 3\.11\.7, and here are Ray "):
        worker(head, tmp_path, seconds=600).run()


def test_a_wrong_interface_ends_it_at_once(head: str, tmp_path: Path) -> None:
    config = PagodaConfig(network_interface="nowhere0")
    with pytest.raises(ConfigError, match="network_interface=nowhere0: there is no interface"):
        WorkerNode(config, head, RayNode.of(config), tmp_path).run()


def test_the_interface_of_the_node_is_handed_on_to_its_ranks_only_where_it_was_named(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    ray_that(monkeypatch, f"import os; open({str(seen)!r}, 'w').write(str(os.environ.get('GLOO_SOCKET_IFNAME')))")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for interface, expected in ((None, "None"), ("lo", "lo")):
        seen.unlink(missing_ok=True)
        config = PagodaConfig(network_interface=interface)
        with running(WorkerNode(config, head, RayNode.of(config), tmp_path / "state")):
            wait_until(lambda: seen.exists() and seen.read_text())
        assert seen.read_text() == expected


def test_without_an_address_the_command_asks_which_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGODA_RAY_ADDRESS", raising=False)
    assert main(["join"]) == 2
    assert "no Ray head is given: `pagoda join HOST:PORT`" in capsys.readouterr().err


def test_a_head_that_does_not_come_is_exit_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["join", "127.0.0.1:1", "--rendezvous-timeout-seconds=0.2", f"--state-directory={tmp_path}"]
    assert main(words) == 1
    assert "pagoda join: the Ray head at 127.0.0.1:1 cannot be reached: " in capsys.readouterr().err


def test_sigterm_while_it_waits_is_a_clean_end(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pagoda.cli.main", "join", "127.0.0.1:1", f"--state-directory={tmp_path}"]
    )
    wait_until(lambda: published(tmp_path)[0] is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
