"""The program for machines with a GPU, tried out without one: it must not fail there for a reason that could be seen here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


def dry_run(scratch: Path, parts: list[str], *more: str) -> dict[str, dict[str, Any]]:
    out = scratch / "out"
    done = run_on_a_bare_machine(
        scratch, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *more, "--parts", *parts
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {part: json.loads((out / f"{part}.json").read_text()) for part in parts}


def test_a_bare_machine_is_bare(tmp_path: Path) -> None:
    assert "No module named 'pydantic'" in run_on_a_bare_machine(tmp_path, "-c", "import pydantic").stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "parts",
    [
        ["kernels", "decode", "workload"],
        pytest.param(
            ["parity", "allocation", "prefill", "elementwise", "online", "peers", "cold_start"], marks=pytest.mark.slow
        ),
    ],
    ids=["first", "rest"],
)
def test_every_part_has_its_figures(tmp_path: Path, parts: list[str]) -> None:
    results = dry_run(tmp_path, parts)
    assert {result["status"] for result in results.values()} == {"ok"}
    for result in results.values():
        assert result["headline"]
        assert result["environment"]["device"] == "cpu (dry run)"
        assert {"commit", "versions", "tuning_table"} <= set(result["environment"])
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["parts"]) == parts
    assert not (out / "models").exists()
    plot = (out / "plots.svg").read_text()
    titles = {"decode": "Decode", "prefill": "Prefill", "workload": "256 requests", "online": "Poisson arrivals"}
    assert all((title in plot) == (part in parts) for part, title in titles.items())
    if "kernels" in parts:
        assert len(results["kernels"]["results"]) == results["kernels"]["headline"]["checks"] > 10
        assert {entry["kv_dtype"] for entry in results["decode"]["results"]} == {"float32", "float8_e4m3fn"}


@pytest.mark.timeout(300)
def test_a_table_is_tuned_if_asked_for(tmp_path: Path) -> None:
    result = dry_run(tmp_path, ["tune"])["tune"]
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


class Ended(BaseException):
    """Stands for the end of the process."""


class OneEntry:
    """A context, and a part that has measured one thing when the time is up."""

    def __init__(self, out: Path) -> None:
        self.out, self.dry_run, self.environment, self.known_ceilings = out, False, {"device": "none"}, None
        self.entries: list[dict[str, Any]] = []
        self.children = [SimpleNamespace(kill=lambda: self.killed.append(1))]
        self.killed: list[int] = []
        self.time_is_up: Any = None
        self.left = 60.0

    def seconds_left(self) -> float:
        return self.left

    def write(self, name: str, result: dict[str, Any]) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(result))

    def run(self, context: Any) -> dict[str, Any]:
        self.entries.append({"heads": 8, "kv_heads": 8, "batch": 1, "context": 1, "kv_dtype": "b", "share_of_copy": 1})
        self.time_is_up()
        raise AssertionError("the process went on")


def test_a_part_that_runs_when_the_time_is_up_is_cut_off_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import __main__ as program

    def end(status: int) -> None:
        raise Ended(status)

    context = OneEntry(tmp_path)
    run = program.Run(context)
    context.time_is_up = run.cut_off
    monkeypatch.setattr(program.importlib, "import_module", lambda name: context)
    monkeypatch.setattr(program.os, "_exit", end)
    with pytest.raises(Ended):
        run.part("decode")
    written = json.loads((tmp_path / "decode.json").read_text())
    assert (written["status"], written["results"]) == ("cut off", context.entries)
    assert json.loads((tmp_path / "summary.json").read_text())["parts"]["decode"]["status"] == "cut off"
    assert "Decode attention" in (tmp_path / "plots.svg").read_text()
    assert context.killed


def test_a_part_for_which_too_little_time_is_left_says_so(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import Run

    context = OneEntry(tmp_path)
    context.left = 3.0
    Run(context).part("decode")
    assert json.loads((tmp_path / "decode.json").read_text())["status"] == "no time left"


def test_parts_that_are_left_out_for_want_of_time_fit_in_all() -> None:
    from benchmarks.gpu.__main__ import DEFAULT_PARTS, PARTS, SECONDS_TO_END

    assert sum(PARTS[name].least_seconds for name in DEFAULT_PARTS) + SECONDS_TO_END < 9 * 60
    assert "tune" not in DEFAULT_PARTS
    assert list(PARTS)[:3] == ["kernels", "parity", "allocation"], "first whether it is right"
