"""Pagoda and other engines on the same checkpoint and prompts, in turn, in one run: `make bench-peers ARGS=…`.

    python benchmarks/peers/compare.py --prepare                    # checkpoints, conversions, caches; not timed
    python benchmarks/peers/compare.py --quick                      # bf16, the five main rows
    python benchmarks/peers/compare.py --weights bf16 int8 --rows decode-1 decode-8 online --peers openvino vllm

Peers are installed by `make peers`. Results are written after every row to benchmarks/results/. Method: benchmarks/NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.checkpoints import HERE, MODELS, PEERS_FOLDER, python_of
from harness.engine import MODULES
from harness.results import OWN, Results
from harness.rows import EXTRA_ROWS, MAIN_ROWS
from harness.session import Plan, Session

ROOT = HERE.parent.parent
WEIGHTS = ("bf16", "fp32", "int8")
QUICK_SLOWEST = 2.5


def main() -> None:
    """Run what the command line asks for."""
    own = _parser().parse_args()
    os.chdir(ROOT)
    cores = sorted(os.sched_getaffinity(0))[: own.threads]
    if len(cores) < own.threads:
        raise SystemExit(f"--threads {own.threads}: this process may use {len(cores)} cores")
    logs = PEERS_FOLDER / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        engines=(OWN, *own.peers),
        row_names=tuple(own.rows or MAIN_ROWS + (() if own.quick else EXTRA_ROWS)),
        pairs=own.pairs,
        quick=own.quick,
        slowest=own.slowest or (QUICK_SLOWEST if own.quick else float("inf")),
        threads=own.threads,
        cores=cores,
        logs=logs,
    )
    head = {} if own.prepare else {**_environment(own.threads), "pairs": own.pairs, "quick": own.quick}
    path = logs / "prepare" if own.prepare else own.output
    results = Results(path, {"time": "", "commit": "", "cpu": {"name": "", "instruction_sets": []}, **DEFAULTS, **head})
    for model in own.models or (["qwen3-0.6b"] if own.quick else list(MODELS)):
        for weights in own.weights or (["bf16"] if own.quick else list(WEIGHTS)):
            with Session(model, weights, plan, results) as session:
                if own.prepare:
                    session.prepare()
                else:
                    session.run()
    print(f"written: {path.with_suffix('.md')}")


DEFAULTS: dict[str, Any] = {"threads": 0, "pairs": 0, "limits": {}}


def _environment(threads: int) -> dict[str, Any]:
    """Machine, versions and commit as Pagoda reports them, and the machine's limits, measured now."""
    python = str(python_of(OWN))
    code = "import json; from pagoda.benchmarking.environment import environment; print(json.dumps(environment()))"
    facts = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    limits = subprocess.run(
        [python, str(HERE / "limits.py"), str(threads)], check=True, capture_output=True, text=True
    ).stdout
    return {**facts, "threads": threads, "limits": json.loads(limits), "load_average": os.getloadavg()[0]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [name for name in MODULES if name != OWN]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all; quick: qwen3-0.6b")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, help="default: all; quick: bf16")
    parser.add_argument("--rows", nargs="+", choices=[*MAIN_ROWS, *EXTRA_ROWS], help="default: all; quick: main rows")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="shorter runs; peers far behind are not paired")
    parser.add_argument("--slowest", type=float, help="times slower than the best at which a peer is not paired")
    parser.add_argument("--prepare", action="store_true", help="make and load everything once, measure nothing")
    stamp = time.strftime("%Y%m%d-%H%M", time.gmtime())
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/peers-{stamp}"), metavar="PATH")
    return parser


if __name__ == "__main__":
    main()
