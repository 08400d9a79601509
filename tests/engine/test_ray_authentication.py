"""A Ray head as Pagoda starts it: what it listens on, and that a token that is missing or wrong ends in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.distributed.ray.head import STARTED, end_ray
from pagoda.distributed.ray.node import RayNode, ray_environment
from pagoda.distributed.ray.open_ports import CLIENT_SERVER_PORT
from pagoda.parallel.interfaces import choose_outward_interface
from tests.support.ports import free_port
from tests.support.waiting import wait_until

CONNECT = """
import json, sys, time
from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.cluster import cluster_nodes, connect_cluster
from pagoda.distributed.ray.open_ports import open_ports
from pagoda.errors import PagodaError
try:
    connect_cluster(PagodaConfig(ray_address=sys.argv[1]), time.monotonic() + 60, lambda words: None)
    print(json.dumps({"nodes": len(cluster_nodes()), "ports": [[port.process, port.port] for port in open_ports()]}))
except PagodaError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a user who has given Ray no token. Paths of Ray's sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="pgr", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[str]:
    """HOST:PORT of a head that was given no token."""
    environ = environment(home)
    address = choose_outward_interface(None).address
    port = free_port()
    first = 50_000 if port < 50_000 else 40_000  # Ray refuses a head's port among those of its workers
    node = replace(RayNode.of(PagodaConfig(ray_num_cpus=1), address), head_port=port, worker_ports=(first, first + 99))
    log = home / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            node.command(),
            env=ray_environment(environ, RayAuthentication.of_head(environ)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: STARTED in log.read_text() or process.poll() is not None, "the Ray head", seconds=200)
        assert process.poll() is None, log.read_text()
        yield f"{address}:{node.head_port}"
    finally:
        end_ray(process, 10)
        shutil.rmtree(home / "ray", ignore_errors=True)


def environment(home: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**own, "HOME": str(home), "RAY_TMPDIR": str(home)}


def start_client(head: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, head],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_token_lets_in_and_nothing_else_does(head: str, home: Path) -> None:
    environ = environment(home)
    others = [
        {**environ, "HOME": str(home / "nobody")},
        {**environ, "RAY_AUTH_TOKEN": "wrong" * 8},
    ]
    clients = [start_client(head, other) for other in (environ, *others)]
    texts = [client.communicate(timeout=150) for client in clients]
    assert all(output for output, _ in texts), "\n".join(errors[-1500:] for _, errors in texts)
    answers = [json.loads(output.splitlines()[-1]) for output, _ in texts]
    assert answers[0].get("nodes") == 1, texts[0]
    for answer in answers[1:]:
        assert answer["type"] == "ConfigError"
        assert f"the Ray cluster at {head} refuses this machine: RAY_AUTH_TOKEN" in answer["error"]
    # No client server, on its own port or on another.
    listening = {process for process, _ in answers[0]["ports"]}
    assert {"gcs_server", "raylet"} <= listening
    assert not [process for process in listening if "client" in process.lower()]
    with socket.socket() as probe:
        assert probe.connect_ex((head.partition(":")[0], CLIENT_SERVER_PORT)) != 0
