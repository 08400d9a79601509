"""`pagoda bench`: latency and throughput of the engine, and load on a server. Each kind has a module, imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from pagoda.config.names import nearest
from pagoda.errors import InvalidRequestError

KINDS = {
    "latency": ("pagoda.cli.bench_latency", "the engine in this process: prefill and each decode step of one batch"),
    "throughput": ("pagoda.cli.bench_throughput", "the engine in this process: how much of a workload gets through"),
    "serve": ("pagoda.cli.bench_serve", "load on a running server, of any make: TTFT, ITL, TPOT, E2E, goodput"),
}


def run(arguments: Sequence[str]) -> int:
    """Run the kind of measurement that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pagoda bench KIND [OPTIONS]\n\nKinds:")
        print("\n".join(f"  {name:<11} {purpose}" for name, (_, purpose) in KINDS.items()))
        return 0 if arguments else 2
    kind = arguments[0]
    if kind not in KINDS:
        hint = nearest(kind, KINDS) or f"; there are {', '.join(KINDS)}"
        raise InvalidRequestError(f"unknown kind of measurement {kind}{hint}")
    return int(importlib.import_module(KINDS[kind][0]).run(arguments[1:]))
