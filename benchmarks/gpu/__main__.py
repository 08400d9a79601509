"""Everything that needs a GPU to be known, in two commands; each ends by itself:

    python -m benchmarks.gpu --run right --out DIR      is it right: 3 minutes
    python -m benchmarks.gpu --run fast --out DIR       how fast is it: 9 minutes, the least important last
    python -m benchmarks.gpu --parts decode tune --out DIR [--minutes 9]      these parts, one after the other

Runs from the bare tree (PYTHONPATH=runtime:kernels) with torch, triton, transformers and numpy. **Every part is a process of
its own with its own limit** (`benchmarks.gpu.part`): an illegal access, a kernel that never ends or a line that somebody
prints costs that part and no other. A part that is cut off, or dies, leaves what it had measured until then.

DIR/results.json has all parts with device, versions and commit, and is written again after each of them; DIR/summary.json the
figures that count, DIR/plots.svg draws them (`python -m benchmarks.gpu.plots DIR` draws it again), DIR/tuned has the tables of
`tune`. `--dry-run` does the same on a CPU, with sizes so small that only the program itself is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Part(NamedTuple):
    """`least_seconds`: with less time than that there is no use in beginning; after `most_seconds` it is cut off."""

    about: str
    least_seconds: float
    most_seconds: float


PARTS = {
    "kernels": Part(
        "kernels against a float64 computation, with poisoned outputs; three times, bits compared", 20, 100
    ),
    "parity": Part("the engine against transformers: float32, bfloat16 in chunks, graphs against eager steps", 30, 120),
    "allocation": Part("no allocation on the device after ready", 20, 60),
    "decode": Part("decode attention over the copy bandwidth", 15, 90),
    "workload": Part("256 requests, output tokens a second: 8B and 0.6B", 40, 120),
    "profile": Part("which kernels a step spends its time in", 20, 60),
    "prefill": Part("prefill attention over the rate of matrix products, beside SDPA", 10, 60),
    "elementwise": Part("norm, activation, rotation and sampling over the copy bandwidth", 10, 40),
    "online": Part("Poisson arrivals: time to first token, inter-token latency", 40, 110),
    "workload_more": Part("256 requests, output tokens a second: 14B, and 8B with a float8 cache", 40, 120),
    "peers": Part("transformers' continuous batching on the same workload", 50, 100),
    "cold_start": Part("from start to ready, by stage", 60, 120),
    "tune": Part("a tuning table for this GPU: OUT/tuned/sm_XY.json", 60, 1800),
}


class Run(NamedTuple):
    """Parts in the order of their importance; those of one group run side by side."""

    minutes: float
    groups: tuple[tuple[str, ...], ...]
    limits: dict[str, float]
    """Seconds for parts that take less here than alone."""


RUNS = {
    "right": Run(3, (("kernels", "parity"), ("allocation",), ("decode",)), {"decode": 40}),
    "fast": Run(
        9,
        (
            ("workload",),
            ("profile",),
            ("decode",),
            ("prefill",),
            ("elementwise",),
            ("tune",),
            ("online",),
            ("workload_more",),
            ("cold_start",),
        ),
        {"tune": 90, "decode": 60},
    ),
}
# What writing the last files takes.
SECONDS_TO_END = 5.0


def main() -> int:
    """Run the parts that were asked for; the status is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description="Checks and benchmarks on a GPU.",
        epilog="parts: "
        + "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
        + ". A table that tune has "
        "written is taken from kernels/pagoda_kernels/tuned.",
        prog="python -m benchmarks.gpu",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", choices=list(RUNS), help="right: is it right, 3 minutes; fast: how fast is it, 9 minutes"
    )
    what.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument(
        "--minutes", type=float, help="time for all parts together; by default that of the run, 9 for parts"
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, for trying out this program")
    own = parser.parse_args()
    run = RUNS[own.run] if own.run else Run(9, tuple((name,) for name in PARTS if name in own.parts), {})
    minutes = run.minutes if own.minutes is None else own.minutes
    deadline = time.monotonic() + 60 * minutes - SECONDS_TO_END
    session = Session(own.out, deadline=deadline, dry_run=own.dry_run)
    try:
        for group in run.groups:
            session.run({name: run.limits.get(name, PARTS[name].most_seconds) for name in group})
    finally:
        session.end()
    return int(any(result["status"] not in ("ok", "no time left") for result in session.results.values()))


@dataclass
class Session:
    """The parts of one call and their results. Touches no GPU itself, so nothing that happens to one reaches it."""

    out: Path
    deadline: float
    dry_run: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)

    @property
    def scratch(self) -> Path:
        """Where parts leave what they have, models and measured ceilings; gone at the end."""
        return self.out / "scratch"

    def run(self, limits: dict[str, float]) -> None:
        """Run these parts side by side, each for so many seconds at most, and write down what they found."""
        children: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        for name, limit in limits.items():
            left = self.deadline - time.monotonic()
            if left < PARTS[name].least_seconds:
                self.results[name] = {
                    "part": name,
                    "about": PARTS[name].about,
                    "status": "no time left",
                    "seconds": 0.0,
                }
                continue
            print(f"{name}: {PARTS[name].about}", flush=True)
            children[name] = (self._start(name, min(limit, left)), time.monotonic() + min(limit, left))
        for name, (child, end) in children.items():
            self.results[name] = self._result(name, child, end)
        self._write()

    def _start(self, name: str, seconds: float) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "benchmarks.gpu.part", name, str(self.out), f"{seconds:.1f}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # A session of its own: what it starts ends with it.
        return subprocess.Popen([*words, *["--dry-run"] * self.dry_run], env=environment, start_new_session=True)

    def _result(self, name: str, child: subprocess.Popen[bytes], end: float) -> dict[str, Any]:
        """Wait for a part until `end`, end all of its processes, and read what it left."""
        is_cut_off = False
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            is_cut_off = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        path = self.scratch / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {"part": name, "about": PARTS[name].about}
        if is_cut_off:
            found["status"] = "cut off"
        elif found.get("status", "running") == "running":
            found |= {
                "status": "failed",
                "error": f"the process ended with status {child.returncode}; its output is above",
            }
        return {"seconds": None, **found}

    def _write(self) -> None:
        environment = next((r["environment"] for r in self.results.values() if "environment" in r), {})
        parts = {name: {k: v for k, v in r.items() if k != "environment"} for name, r in self.results.items()}
        short = {
            name: {key: result.get(key) for key in ("status", "seconds", "headline", "error")}
            for name, result in self.results.items()
        }
        ceilings = self.scratch / "ceilings.json"
        measured = json.loads(ceilings.read_text()) if ceilings.exists() else None
        for name, content in (
            ("results", {"environment": environment, "ceilings": measured, "parts": parts}),
            ("summary", {"environment": environment, "ceilings": measured, "parts": short}),
        ):
            (self.out / f"{name}.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")

    def end(self) -> None:
        """Draw, tidy up and print what there is."""
        from benchmarks.gpu.plots import draw

        self._write()
        draw(self.out)
        shutil.rmtree(self.scratch, ignore_errors=True)
        print(f"\n{'part':<14} {'status':<13} {'seconds':>8}  headline")
        for name, result in self.results.items():
            headline = json.dumps(result.get("headline", result.get("error", "")))
            print(f"{name:<14} {result['status']:<13} {result['seconds'] or 0:>8.1f}  {headline[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
