"""What does not fit together says so: a sentence, in time, with what is wrong, where, and what to set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import pagoda
from pagoda.distributed.ray.node import RayNode, ray_environment
from tests.support.network_nodes import NetworkNode
from tests.support.notes import Note
from tests.support.two_nodes import PAGODA, TOKEN, Answers, TwoNodes, two_nodes
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
DEMO_MODEL = Path(pagoda.__file__).parent / "demo_model"


def package(name: str) -> Path:
    """The directory of an installed package; it is not imported."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Two hosts, on one of which a Ray head was started by hand; a copy of the demo model lies where `model` says."""
    with two_nodes(tmp_path_factory.mktemp("nodes"), number=2) as nodes:
        head = RayNode(address=nodes.head.address, head_port=6379, num_cpus=1)
        nodes.head.start(*head.command(), log="ray.log", environ=ray_environment({**os.environ, **TOKEN}))
        wait_until(lambda: "Ray runtime started" in nodes.head.log("ray.log"), "the Ray head", seconds=200)
        yield nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(DEMO_MODEL, tmp_path_factory.mktemp("models") / "demo")


def serve(pair: TwoNodes, model: Path, *settings: str, seconds: int = 30) -> subprocess.Popen[str]:
    words = ["--ray-address=auto", "--pipeline-parallel-size=2", "--dtype=float32", f"--model={model}"]
    return pair.head.start(
        PAGODA, "serve", *words, f"--rendezvous-timeout-seconds={seconds}", *settings, log="serve.log", environ=TOKEN
    )


def failure_of(pair: TwoNodes, model: Path, *settings: str, seconds: int = 30) -> str:
    """The last words of a server that cannot start."""
    server = serve(pair, model, *settings, seconds=seconds)
    assert server.wait(seconds + 240) in (1, 2)
    return pair.head.log("serve.log")


def join(pair: TwoNodes) -> None:
    pair.join()
    wait_until(lambda: pair.probe_worker("startup")[0] == 0, "the worker in the cluster", seconds=200)


def leave(pair: TwoNodes) -> None:
    pair.joined.terminate()
    assert pair.joined.wait(60) == 0


def test_a_worker_that_is_missing(pair: TwoNodes, model: Path) -> None:
    words = failure_of(pair, model, seconds=5)
    assert "the Ray cluster has no room for tensor_parallel_size=1, pipeline_parallel_size=2: needed are" in words
    assert f"needed are 2 nodes with 1 CPU each; the cluster has 1 CPU on {pair.head.name}" in words


def test_a_machine_that_belongs_to_no_cluster(pair: TwoNodes, model: Path) -> None:
    server = [PAGODA, "serve", "--pipeline-parallel-size=2", f"--model={model}", "--rendezvous-timeout-seconds=20"]
    status, text = pair.worker.run(*server, "--ray-address=auto", timeout=300)
    assert status == 1
    assert "ray_address=auto: this machine is no node of a Ray cluster" in text
    address = f"{pair.head.address}:6379"
    status, text = pair.worker.run(*server, f"--ray-address={address}", timeout=300)
    assert status == 1
    assert f"ray_address={address}: this machine is no node of that cluster; run `pagoda join {address}` here" in text


def test_an_interface_that_the_server_does_not_have(pair: TwoNodes, model: Path) -> None:
    words = failure_of(pair, model, "--network-interface=eth7")
    assert "network_interface=eth7: there is no interface 'eth7'" in words
    assert f"eth0 ({pair.head.address}), eth1 ({pair.head.other_address})" in words


def test_a_worker_with_another_version_of_ray_is_refused_by_name(pair: TwoNodes, tmp_path: Path) -> None:
    other = tmp_path / "_version.py"
    place = package("ray") / "_version.py"
    other.write_text(place.read_text().replace(version("ray"), "2.0.1"))
    pair.worker.views = {place: other}
    pair.join()
    assert pair.joined.wait(200) == 2
    pair.worker.views = {}
    sentence = f"runs Ray {version('ray')} with Python {sys.version.split()[0]}, and here are Ray"
    assert sentence in pair.worker.log("join.log")


def test_a_rank_with_another_torch_and_another_model_is_refused_by_name(
    pair: TwoNodes, model: Path, tmp_path: Path
) -> None:
    (metadata,) = package("torch").parent.glob("torch-*.dist-info/METADATA")
    other_metadata = tmp_path / "METADATA"
    other_metadata.write_text(re.sub(r"(?m)^Version: .*", "Version: 2.1.0", metadata.read_text(), count=1))
    other_model = shutil.copytree(model, tmp_path / "other")
    weights = next(other_model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    pair.worker.views = {metadata: other_metadata, model: other_model}
    join(pair)
    words = failure_of(pair, model)
    leave(pair)
    pair.worker.views = {}
    head, worker = pair.head.name, pair.worker.name
    assert re.search(rf"versions of torch differ: \S+ on rank 0 \({head}\), 2\.1\.0 on rank 1 \({worker}\)", words)
    assert re.search(rf"checkpoints .* differ: \w+ on rank 0 \({head}\), \w+ on rank 1 \({worker}\)", words)


def test_a_checkpoint_that_the_worker_does_not_have(pair: TwoNodes, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    pair.worker.views = {model: empty}
    join(pair)
    words = failure_of(pair, model)
    leave(pair)
    pair.worker.views = {}
    assert re.search(rf"rank 1 of 2 \(host {pair.worker.name}, pid \d+\): .*{model}", words)


def test_the_doctor_sees_both_nodes_and_their_network(pair: TwoNodes, note: Note) -> None:
    join(pair)
    status, text = pair.head.run(PAGODA, "doctor", "--cluster", timeout=300, environ=TOKEN)
    assert status == 0, text
    for node in (pair.head, pair.worker):
        assert f"{node.name} ({node.address})" in text
    assert text.count("would use   eth0") == 2
    note(" ".join(line.strip() for line in text.splitlines() if "network  " in line))


def test_the_doctor_says_which_node_lacks_an_interface(pair: TwoNodes) -> None:
    pair.worker.set_link("eth1", "down")
    status, text = pair.head.run(
        PAGODA, "doctor", "--cluster", "--network-interface=eth1", "--json", timeout=300, environ=TOKEN
    )
    report = json.loads(text[text.index("{\n") :])
    assert status == 1
    assert report["problems"] == [
        f"{pair.worker.name}: network_interface=eth1: the interface eth1 is down; {pair.worker.name} has "
        f"eth0 ({pair.worker.address}), lo (127.0.0.1, ::1), eth1 (down)"
    ]


def test_an_interface_that_is_down_on_the_worker(pair: TwoNodes, model: Path) -> None:
    words = failure_of(pair, model, "--network-interface=eth1")
    pair.worker.set_link("eth1", "up")
    assert f"rank 1 on {pair.worker.name} cannot reach the engine at {pair.head.other_address}" in words


def test_the_interface_that_is_named_carries_the_traffic(pair: TwoNodes, model: Path, note: Note) -> None:
    pair.server = serve(pair, model, "--network-interface=eth1", seconds=200)
    pair.until_ready()

    def counted(node: NetworkNode) -> int:
        return node.bytes_on("eth1")

    before = [counted(node) for node in (pair.head, pair.worker)]
    answers = Answers()
    for _ in range(3):
        pair.ask(("Once upon a time", 80), answers)
    carried = [counted(node) - early for node, early in zip((pair.head, pair.worker), before, strict=True)]
    note(f"240 tokens over the interface that was named: {carried[1]} bytes")
    assert len(answers.finished) == 3
    assert min(carried) > 240 * 192 * 4
    pair.server.terminate()
    assert pair.server.wait(90) == 0


def test_a_token_that_the_head_does_not_know(tmp_path: Path) -> None:
    token = {"RAY_AUTH_TOKEN": "a" * 32}
    with two_nodes(tmp_path, number=3) as nodes:
        head = RayNode(address=nodes.head.address, head_port=6379, num_cpus=1)
        nodes.head.start(*head.command(), log="ray.log", environ=ray_environment({**os.environ, **token}))
        wait_until(lambda: "Ray runtime started" in nodes.head.log("ray.log"), "the Ray head", seconds=300)
        for environ in ({}, {"RAY_AUTH_TOKEN": "b" * 32}):
            words = [f"{nodes.head.name}:6379", "--rendezvous-timeout-seconds=120"]
            status, text = nodes.worker.run(PAGODA, "join", *words, timeout=300, environ=environ)
            assert "refuses this machine: RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must hold the token" in text
            assert status == 2
        words = [f"{nodes.head.name}:6379", f"--state-directory={nodes.state_directory}"]
        nodes.worker.start(PAGODA, "join", *words, log="join.log", environ=token)
        wait_until(lambda: nodes.probe_worker("startup")[0] == 0, "the worker that has the token", seconds=300)
