"""The program for machines with a GPU, tried out without one: it must not fail there for a reason that could be seen here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.waiting import wait_until

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]

# What a machine with a GPU may lack: the program needs torch, triton, transformers and what these bring.
BARE = """
from importlib.machinery import PathFinder
MISSING = {
    "kserve", "ray", "zmq", "msgspec", "pydantic", "fastapi", "starlette", "uvicorn", "grpc", "google", "prometheus_client",
    "kubernetes", "matplotlib", "psutil", "rich", "orjson", "xgrammar", "openai", "pytest",
}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.partition(".")[0] in MISSING else find(name, path, target)
)
"""


def run_on_a_bare_machine(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    bare = scratch / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    paths = os.pathsep.join(map(str, (bare, ROOT / "runtime", ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )


def dry_run(scratch: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The parts of a run, by name."""
    out = scratch / "out"
    done = run_on_a_bare_machine(scratch, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["device"] == "cpu (dry run)"
    assert {"commit", "versions", "tuning_table"} <= set(results["environment"])
    return results["parts"]


def test_a_bare_machine_is_bare(tmp_path: Path) -> None:
    assert "No module named 'pydantic'" in run_on_a_bare_machine(tmp_path, "-c", "import pydantic").stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "parts",
    [
        ["kernels", "decode", "workload"],
        pytest.param(
            [
                "parity",
                "allocation",
                "profile",
                "prefill",
                "elementwise",
                "online",
                "workload_more",
                "peers",
                "cold_start",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["first", "rest"],
)
def test_every_part_has_its_figures(tmp_path: Path, parts: list[str]) -> None:
    results = dry_run(tmp_path, "--parts", *parts)
    assert {result["status"] for result in results.values()} == {"ok"}
    assert all(result["headline"] for result in results.values())
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert sorted(summary["parts"]) == sorted(parts)
    assert not (out / "scratch").exists()
    plot = (out / "plots.svg").read_text()
    titles = {"decode": "Decode", "prefill": "Prefill", "workload": "256 requests", "online": "Poisson arrivals"}
    assert all((title in plot) == (part in parts or f"{part}_more" in parts) for part, title in titles.items())
    if "kernels" in parts:
        assert len(results["kernels"]["results"]) == results["kernels"]["headline"]["checks"] > 10
        assert {entry["kv_dtype"] for entry in results["decode"]["results"]} == {"float32", "float8_e4m3fn"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["right", "fast"])
def test_the_two_runs_leave_few_files(tmp_path: Path, name: str) -> None:
    results = dry_run(tmp_path, "--run", name)
    assert {result["status"] for result in results.values()} == {"ok"}
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files <= {"results.json", "summary.json", "plots.svg", "tuned/default.json"}


@pytest.mark.timeout(300)
def test_a_table_is_tuned_if_asked_for(tmp_path: Path) -> None:
    result = dry_run(tmp_path, "--parts", "tune")["tune"]
    assert result["status"] == "ok", result
    assert set(result["headline"]["gains"]) == {"decode 64 x 4 bytes", "segments", "prefill 64 x 4 bytes"}
    timed = [entry for entry in result["results"] if "microseconds" in entry]
    assert {entry["entry"] for entry in timed} == set(result["headline"]["gains"])
    table = json.loads((tmp_path / "out" / "tuned" / "default.json").read_text())
    shipped = json.loads((ROOT / "kernels" / "pagoda_kernels" / "tuned" / "default.json").read_text())
    assert table["note"].startswith("Measured on cpu (dry run)")
    assert shipped["note"] in table["note"]
    for kind in ("decode_attention", "prefill_attention"):
        served = [{(entry["head_dim"], entry["element_bytes"]) for entry in each[kind]} for each in (table, shipped)]
        assert served[0] == served[1]
        # What was not measured is what it was.
        assert [entry for entry in table[kind] if entry["head_dim"] > 64] == [
            entry
            for entry in sorted(shipped[kind], key=lambda one: (one["element_bytes"], one["head_dim"]))
            if entry["head_dim"] > 64
        ]


PART_THAT = """
import json, os, subprocess, sys, time
from pathlib import Path

name, out, *_ = sys.argv[1:]
path = Path(out, "scratch", name + ".json")
figures = {"part": name, "about": "", "environment": {"device": "none"}, "results": [1]}
path.write_text(json.dumps({**figures, "status": "running"}))
print("(c) a line that is no JSON")
if name == "kernels":
    os.abort()
if name == "parity":
    child = subprocess.Popen(["sleep", "600"])
    path.with_name("child").write_text(str(child.pid))
    time.sleep(600)
path.write_text(json.dumps({**figures, "status": "ok"}))
"""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session whose parts are `PART_THAT`: kernels dies, parity never ends, the others are done at once."""
    from benchmarks.gpu import __main__ as program

    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "part.py").write_text(PART_THAT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return program.Session(tmp_path / "out", deadline=time.monotonic() + 300)


def test_a_part_that_dies_or_never_ends_costs_itself_only(session: Any, tmp_path: Path) -> None:
    session.run({"kernels": 60, "parity": 3})
    child = int((session.scratch / "child").read_text())
    session.run({"peers": 60})
    session.end()
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "kernels": "failed",
        "parity": "cut off",
        "peers": "ok",
    }
    assert "status -6" in parts["kernels"]["error"]
    assert all(part["results"] == [1] for part in parts.values())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_a_part_for_which_too_little_time_is_left_says_so(session: Any) -> None:
    session.deadline = time.monotonic() + 3
    session.run({"decode": 60})
    assert session.results["decode"]["status"] == "no time left"


@pytest.mark.parametrize("name", ["right", "fast"])
def test_parts_that_are_left_out_for_want_of_time_fit_in_all(name: str) -> None:
    from benchmarks.gpu.__main__ import PARTS, RUNS, SECONDS_TO_END

    run = RUNS[name]
    least = sum(max(PARTS[part].least_seconds for part in group) for group in run.groups)
    assert least + SECONDS_TO_END < 60 * run.minutes
    assert RUNS["right"].groups[0] == ("kernels", "parity"), "first whether it is right"
