"""How Ray nodes are started, what is said while a head is waited for, and what Ray's own words are turned into."""

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.node import (
    RayNode,
    address_of_cluster,
    ray_environment,
    refusal_in,
    split_address,
    wait_for_head,
)
from pagoda.errors import CommunicationError, ConfigError
from tests.support.ports import free_port

# What `ray start --address` and `ray.init` say, as of Ray 2.60.
MISMATCH = """RuntimeError: Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.11.7
This process on Ray Client was started with:
    Ray: 2.60.0
    Python: 3.12.1
"""


def test_a_head_is_started_with_a_port_and_a_worker_with_an_address() -> None:
    node = RayNode.of(PagodaConfig(ray_num_cpus=3), "10.0.0.5")
    words = node.command()
    assert "--node-ip-address=10.0.0.5" in words
    assert "--num-cpus=3" in words
    assert "--disable-usage-stats" in words


def test_pinned_ports_do_not_overlap() -> None:
    node = RayNode.of(PagodaConfig(ray_first_port=20000))
    assert (node.node_manager_port, node.object_manager_port, node.worker_ports) == (20000, 20001, (20002, 20099))


def test_the_environment_is_tuned_and_what_is_given_stays() -> None:
    environ = ray_environment({"RAY_health_check_period_ms": "7", "HOME": "/h"})
    assert environ["RAY_health_check_period_ms"] == "7"
    assert environ["HOME"] == "/h"
    assert environ["RAY_gcs_rpc_server_reconnect_timeout_s"] == "5"
    assert "RAY_AUTH_MODE" not in environ


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("head", ("head", 6379)),
        ("head:7000", ("head", 7000)),
        ("10.0.0.1:7000", ("10.0.0.1", 7000)),
        ("[fd00::1]:7000", ("fd00::1", 7000)),
        ("[fd00::1]", ("fd00::1", 6379)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", ":6379", "head:", "head:x", "head:0", "head:70000"])
def test_wrong_addresses_say_what_is_allowed(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST or HOST:PORT of a Ray head"):
        split_address(address)


def test_a_version_conflict_names_both_sides() -> None:
    sentence = refusal_in(MISMATCH, "head:6379", "2.60.0")
    assert sentence is not None
    assert sentence.startswith(
        "the Ray cluster at head:6379 runs Ray 2.59.0 with Python 3.11.7, and here are Ray 2.60.0 with"
    )


@pytest.mark.parametrize(
    "text",
    [
        "ray.exceptions.AuthenticationError: Token authentication is enabled but ...",
        "status = StatusCode.UNAUTHENTICATED Unauthenticated: InvalidAuthToken: Authentication token is missing",
    ],
)
def test_a_refused_token_says_which_variable(text: str) -> None:
    sentence = refusal_in(text, "head:6379", "2.60.0")
    assert sentence is not None
    assert "RAY_AUTH_TOKEN" in sentence


def test_other_words_are_no_refusal() -> None:
    assert refusal_in("ConnectionError: failed to connect to GCS", "head:6379", "2.60.0") is None


def test_waiting_for_a_head_says_why_and_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    said: list[str] = []
    with pytest.raises(CommunicationError, match=r"cannot be reached: connection refused: nothing listens on port"):
        wait_for_head(f"127.0.0.1:{port}", time.monotonic() + 0.1, said.append)
    assert said == [
        f"waiting for the Ray head at 127.0.0.1:{port}: connection refused: nothing listens on port {port} of 127.0.0.1 (yet)"
    ]

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(CommunicationError, match="the name head is not known"):
        wait_for_head("head", time.monotonic(), said.append)


def test_a_head_that_listens_is_found_and_one_told_to_stop_stops() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert wait_for_head(f"127.0.0.1:{server.getsockname()[1]}", time.monotonic(), print)
    assert not wait_for_head("127.0.0.1:1", time.monotonic() + 60, print, lambda: True)


@pytest.fixture
def ray_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which no raylet runs, and where Ray keeps its files."""
    monkeypatch.setattr("psutil.process_iter", lambda attributes: iter(()))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def test_a_machine_of_no_cluster_is_told_to_join_first(ray_directory: Path) -> None:
    with pytest.raises(
        ConfigError, match="ray_address=auto: this machine is no node of a Ray cluster; run `pagoda join"
    ):
        address_of_cluster("auto")
    with pytest.raises(ConfigError, match=r"no node of that cluster; run `pagoda join 10\.0\.0\.1:6379` here first"):
        address_of_cluster("10.0.0.1:6379")


def test_the_cluster_that_was_joined_here_is_found_by_auto_and_by_any_of_its_names(
    ray_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ray_directory / "ray_current_cluster").write_text("127.0.0.1:7000")
    assert address_of_cluster("auto") == "127.0.0.1:7000"
    assert address_of_cluster("127.0.0.1:7000") == "127.0.0.1:7000"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.0.1", 0))])
    assert address_of_cluster("head.example:7000") == "127.0.0.1:7000"
    with pytest.raises(ConfigError, match=r"no node of that cluster; it belongs to 127\.0\.0\.1:7000"):
        address_of_cluster("head.example:7001")


def test_a_raylet_that_runs_here_counts_more_than_what_was_joined_last(
    ray_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ray_directory / "ray_current_cluster").write_text("10.0.0.9:6379")
    info = {"name": "raylet", "cmdline": ["raylet", "--gcs-address=10.0.0.1:6379"], "uids": SimpleNamespace(real=0)}
    here = SimpleNamespace(pid=os.getpid(), info=info)
    monkeypatch.setattr("psutil.process_iter", lambda attributes: iter([here]))
    assert address_of_cluster("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert address_of_cluster("auto") == "10.0.0.9:6379"
