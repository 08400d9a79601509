"""Everything that needs a GPU to be known, in one command, the most important first:

    python -m benchmarks.gpu --out DIR [--minutes 9] [--parts kernels decode …]

Runs from the bare tree (PYTHONPATH=runtime:kernels) with torch, triton, transformers and numpy. Each part writes
DIR/PART.json as soon as it is done, with device, versions and commit; DIR/summary.json lists all. When the time is up, the
parts that are left say so. `--dry-run` does the same on a CPU, with sizes so small that only the program itself is tried.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# In order of importance: first whether it is right, then how fast it is.
PARTS = {
    "kernels": "kernels against float64 twins, with poisoned outputs",
    "parity": "the engine against transformers, four families",
    "allocation": "no allocation on the device after ready",
    "decode": "decode attention over the copy bandwidth",
    "workload": "256 requests, output tokens a second",
    "prefill": "prefill attention over the rate of matrix products, beside SDPA",
    "elementwise": "norm, activation, rotation and sampling over the copy bandwidth",
    "cold_start": "from start to ready, by stage",
    "online": "Poisson arrivals: time to first token, inter-token latency",
    "peers": "transformers' continuous batching on the same workload",
}


def main() -> int:
    """Run the parts that were asked for; the status is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Checks and benchmarks on a GPU.", prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, for trying out this program")
    own = parser.parse_args()
    if own.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is after this

    from benchmarks.gpu.context import Context

    context = Context.create(own.out, minutes=own.minutes, dry_run=own.dry_run)
    results = {name: _run_part(name, context) for name in PARTS if name in own.parts}
    shutil.rmtree(own.out / "models", ignore_errors=True)
    _print_summary(results)
    return int(any(result["status"] == "failed" for result in results.values()))


def _run_part(name: str, context: Any) -> dict[str, Any]:
    """Run one part and write its file; what goes wrong is a result too, and the next part runs."""
    started = time.perf_counter()
    result: dict[str, Any] = {"part": name, "about": PARTS[name], "environment": context.environment}
    if context.seconds_left() <= 0:
        result |= {"status": "no time left"}
    else:
        print(f"{name}: {PARTS[name]}", flush=True)
        try:
            figures = importlib.import_module(f"benchmarks.gpu.{name}").run(context)
            result |= {"status": "ok" if figures.pop("passed", True) else "failed", **figures}
        except Exception as error:
            traceback.print_exc()
            result |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        context.release()
    result["seconds"] = time.perf_counter() - started
    context.write(name, result)
    context.write("summary", context.summary(name, result))
    return result


def _print_summary(results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'part':<12} {'status':<13} {'seconds':>8}  headline")
    for name, result in results.items():
        headline = json.dumps(result.get("headline", result.get("error", "")))
        print(f"{name:<12} {result['status']:<13} {result['seconds']:>8.1f}  {headline[:200]}")


if __name__ == "__main__":
    sys.exit(main())
