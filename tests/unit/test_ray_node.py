"""How Ray nodes are started, what is said while a head is waited for, and what Ray's own words are turned into."""

import socket
import time

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.errors import CommunicationError, ConfigError
from pagoda.execution.ray_node import RayNode, ray_environment, refusal_in, split_address, wait_for_head

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


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_turns_authentication_on(variable: str) -> None:
    assert ray_environment({variable: "t"})["RAY_AUTH_MODE"] == "token"
    assert ray_environment({variable: "t", "RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"


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
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said: list[str] = []
    with pytest.raises(CommunicationError, match=r"cannot be reached: 127\.0\.0\.1 is there and nobody listens"):
        wait_for_head(f"127.0.0.1:{port}", time.monotonic() + 0.1, said.append)
    assert said == [
        f"waiting for the Ray head at 127.0.0.1:{port}: 127.0.0.1 is there and nobody listens on port {port} (yet)"
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
