"""`pagoda doctor --cluster`: what is printed of a cluster, and of none."""

import json
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.distributed.ray import cluster_check
from pagoda.distributed.ray.cluster_check import ClusterReport, NodeReport
from pagoda.errors import CommunicationError

VERSIONS = {"pagoda": "0.1.0", "python": "3.11", "torch": "2.13.0", "ray": "2.60.0"}
FIRST = NodeReport(
    host="a",
    address="10.0.0.1",
    cpus=2,
    gpus=0,
    interfaces=("eth0 (10.0.0.1)", "lo (127.0.0.1)"),
    interface="eth0",
    versions=VERSIONS,
    latency_seconds=0.0004,
)
SECOND = NodeReport(
    host="b",
    address="10.0.0.2",
    cpus=2,
    gpus=1,
    interfaces=("eth0 (10.0.0.2)",),
    interface="eth0",
    versions=VERSIONS,
    latency_seconds=0.0005,
    bytes_per_second=9.4e8,
)
SILENT = NodeReport(
    host="c", address="10.0.0.3", cpus=1, gpus=0, problem="no answer within 60 s: is the node still there?"
)


def found(monkeypatch: pytest.MonkeyPatch, *nodes: NodeReport, problems: tuple[str, ...] = ()) -> None:
    report = ClusterReport(address="10.0.0.1:6379", nodes=nodes, problems=problems)
    monkeypatch.setattr(cluster_check, "check_cluster", lambda config, on_progress: report)


def test_nodes_their_interfaces_and_the_network_between_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, FIRST, SECOND)
    assert main(["doctor", "--cluster"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Ray cluster at 10.0.0.1:6379\n")
    assert (
        "  b (10.0.0.2)\n    offers      2 CPU, 1 GPU\n    interfaces  eth0 (10.0.0.2)\n    would use   eth0\n" in text
    )
    assert "    network     0.50 ms, 940 MB/s from the node above" in text
    assert "PROBLEM" not in text


def test_a_node_that_does_not_answer_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, FIRST, SILENT, problems=(f"c: {SILENT.problem}",))
    assert main(["doctor", "--cluster"]) == 1
    text = capsys.readouterr().out
    assert "    interfaces  unknown\n    would use   none\n    versions    unknown" in text
    assert text.endswith("PROBLEM: c: no answer within 60 s: is the node still there?\n")


def test_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found(monkeypatch, FIRST)
    assert main(["doctor", "--cluster", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nodes"][0]["interface"] == "eth0"
    assert report["problem"] is None


def test_no_cluster_is_a_problem_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.process_iter", lambda attributes: iter(()))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["doctor", "--cluster"]) == 1
    assert "PROBLEM: ray_address=auto: this machine is no node of a Ray cluster" in capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_one_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> None:
        raise CommunicationError("the Ray head at h:6379 cannot be reached")

    monkeypatch.setattr(cluster_check, "check_cluster", unreachable)
    assert main(["doctor", "--cluster"]) == 1
    assert "PROBLEM: the Ray head at h:6379 cannot be reached" in capsys.readouterr().out
