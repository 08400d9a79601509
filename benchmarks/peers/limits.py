"""What this machine can do: reading and matrix products, as JSON. `python limits.py THREADS`, in Pagoda's environment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

READ_ELEMENTS = 2**28  # 1 GiB of float32: more than any cache
ROWS, INPUTS, OUTPUTS = 512, 1024, 3072
REPEATS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The shortest of several runs: what is possible, not what is usual."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Measure and print."""
    threads = int(sys.argv[1])
    values = torch.ones(READ_ELEMENTS)
    report = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        report[f"read_gb_per_second_{count}_threads"] = values.nbytes / best_seconds(values.sum) / 1e9
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            left, right = torch.rand(ROWS, INPUTS, dtype=dtype), torch.rand(OUTPUTS, INPUTS, dtype=dtype)
            seconds = best_seconds(lambda a=left, b=right: torch.nn.functional.linear(a, b))
            report[f"gemm_{name}_gflop_per_second_{count}_threads"] = 2 * ROWS * INPUTS * OUTPUTS / seconds / 1e9
    print(json.dumps(report))


if __name__ == "__main__":
    main()
