"""The program for machines with a GPU, tried out without one: it must not fail there for a reason that could be seen here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def dry_run(out: Path, parts: list[str], *more: str) -> dict[str, dict[str, object]]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'runtime'}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *more, "--parts", *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return {part: json.loads((out / f"{part}.json").read_text()) for part in parts}


@pytest.mark.timeout(600)
def test_every_part_but_the_long_ones(tmp_path: Path) -> None:
    parts = ["kernels", "allocation", "decode", "workload", "prefill", "elementwise", "online", "peers"]
    results = dry_run(tmp_path, parts)
    assert {result["status"] for result in results.values()} == {"ok"}
    for result in results.values():
        assert result["headline"]
        assert result["environment"]["device"] == "cpu (dry run)"
        assert {"commit", "versions", "tuning_table"} <= set(result["environment"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["parts"]) == parts
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_long_parts(tmp_path: Path) -> None:
    results = dry_run(tmp_path, ["parity", "cold_start"])
    assert {result["status"] for result in results.values()} == {"ok"}


@pytest.mark.timeout(600)
def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    results = dry_run(tmp_path, ["kernels", "decode"], "--minutes", "0")
    assert {result["status"] for result in results.values()} == {"no time left"}
