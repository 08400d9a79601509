"""Everything that needs a GPU to be known, in one command, the most important first:

    python -m benchmarks.gpu --out DIR [--minutes 9] [--parts kernels decode …]

`--parts tune` does something else, and is done only if asked for: it measures a tuning table for the GPU at hand, see `tune`.

Runs from the bare tree (PYTHONPATH=runtime:kernels) with torch, triton, transformers and numpy. Each part writes
DIR/PART.json as soon as it is done, with device, versions and commit; DIR/summary.json lists all, and DIR/plots.svg shows them
(`python -m benchmarks.gpu.plots DIR` draws it again). A part for which too little time is left says so and is left out. When
the time is up, the one that runs is cut off with what it has, and the program ends.

`--dry-run` does the same on a CPU, with sizes so small that only the program itself is tried.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple


class Part(NamedTuple):
    """`least_seconds`: with less time than that there is no use in beginning. `asked`: left out unless it is named."""

    about: str
    least_seconds: float
    asked: bool = False


# In order of importance: first whether it is right, then how fast it is.
PARTS = {
    "kernels": Part("kernels against a float64 computation, with poisoned outputs", 20),
    "parity": Part("the engine against transformers, four families", 30),
    "allocation": Part("no allocation on the device after ready", 20),
    "decode": Part("decode attention over the copy bandwidth", 15),
    "workload": Part("256 requests, output tokens a second", 40),
    "prefill": Part("prefill attention over the rate of matrix products, beside SDPA", 10),
    "elementwise": Part("norm, activation, rotation and sampling over the copy bandwidth", 10),
    "online": Part("Poisson arrivals: time to first token, inter-token latency", 40),
    "peers": Part("transformers' continuous batching on the same workload", 50),
    "cold_start": Part("from start to ready, by stage", 90),
    "tune": Part("a tuning table for this GPU: OUT/tuned/sm_XY.json", 60, asked=True),
}
DEFAULT_PARTS = [name for name, part in PARTS.items() if not part.asked]
# What writing the last files takes.
SECONDS_TO_END = 5.0


def main() -> int:
    """Run the parts that were asked for; the status is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description="Checks and benchmarks on a GPU.",
        epilog="parts: "
        + "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
        + ". All but tune, if none is named; "
        "a table that tune has written is taken from kernels/pagoda_kernels/tuned.",
        prog="python -m benchmarks.gpu",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=DEFAULT_PARTS)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, for trying out this program")
    own = parser.parse_args()
    if own.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is after this
    deadline = time.monotonic() + 60 * own.minutes

    from benchmarks.gpu.context import Context

    run = Run(Context.create(own.out, deadline=deadline - SECONDS_TO_END, dry_run=own.dry_run))
    watchdog = threading.Timer(deadline - SECONDS_TO_END - time.monotonic(), run.cut_off)
    watchdog.daemon = True
    if own.minutes > 0:
        watchdog.start()
    for name in PARTS:
        if name in own.parts:
            run.part(name)
    watchdog.cancel()
    return run.end()


class Run:
    """The parts of one call, their results, and the end of it, which may come from another thread."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.results: dict[str, dict[str, Any]] = {}
        self._running: str | None = None
        self._started = 0.0
        self._lock = threading.Lock()

    def part(self, name: str) -> None:
        """Run one part and write its file; what goes wrong is a result too, and the next part runs."""
        self._running, self._started = name, time.perf_counter()
        self.context.entries = []
        if self.context.seconds_left() < (0 if self.context.dry_run else PARTS[name].least_seconds):
            self._finish(name, {"status": "no time left"})
            return
        print(f"{name}: {PARTS[name].about}", flush=True)
        try:
            figures = importlib.import_module(f"benchmarks.gpu.{name}").run(self.context)
            result = {"status": "ok" if figures.pop("passed", True) else "failed", **figures}
        except Exception as error:
            traceback.print_exc()
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            result["results"] = self.context.entries
        self._finish(name, result)
        self.context.release()

    def cut_off(self) -> None:
        """The time is up: keep what the running part has, and end the process, whatever it is waiting for."""
        for child in self.context.children:
            child.kill()
        if self._running is not None:
            self._finish(self._running, {"status": "cut off", "results": list(self.context.entries)})
        sys.stdout.flush()
        os._exit(self.end())

    def end(self) -> int:
        """Draw, tidy up and print what there is; the status."""
        from benchmarks.gpu.plots import draw

        draw(self.context.out)
        shutil.rmtree(self.context.out / "models", ignore_errors=True)
        _print_summary(self.results)
        sys.stdout.flush()
        return int(any(result["status"] == "failed" for result in self.results.values()))

    def _finish(self, name: str, result: dict[str, Any]) -> None:
        with self._lock:
            if name in self.results:  # the watchdog was first
                return
            self._running = None
            about = {"part": name, "about": PARTS[name].about, "environment": self.context.environment}
            self.results[name] = {**about, **result, "seconds": time.perf_counter() - self._started}
            self.context.write(name, self.results[name])
            self.context.write("summary", self._summary())

    def _summary(self) -> dict[str, Any]:
        short = {
            name: {key: result.get(key) for key in ("status", "seconds", "headline", "error")}
            for name, result in self.results.items()
        }
        return {"environment": self.context.environment, "ceilings": self.context.known_ceilings, "parts": short}


def _print_summary(results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'part':<12} {'status':<13} {'seconds':>8}  headline")
    for name, result in results.items():
        headline = json.dumps(result.get("headline", result.get("error", "")))
        print(f"{name:<12} {result['status']:<13} {result['seconds']:>8.1f}  {headline[:200]}")


if __name__ == "__main__":
    sys.exit(main())
