"""Measures what this machine's cores can do at most: products of matrices, and reading memory. Takes them for a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pagoda.monitoring.steps import Machine

_SECONDS = 0.4
_SIZE = 1024
_COPY_BYTES = 256 * 2**20


def measure(dtype: str, threads: int | None) -> Machine:
    """By torch's own operations, the best of half a second each. `dtype`: of the products; `threads`: None for all."""
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        kind = getattr(torch, dtype) if dtype in ("bfloat16", "float32") else torch.float32
        left, right = torch.ones(_SIZE, _SIZE, dtype=kind), torch.ones(_SIZE, _SIZE, dtype=kind)
        product = _best(lambda: left @ right)
        memory: Any = torch.ones(_COPY_BYTES // 4, dtype=torch.float32)
        read = _best(memory.sum)
    finally:
        torch.set_num_threads(before)
    return Machine(
        flops=2 * _SIZE**3 / product,
        bytes=_COPY_BYTES / read,
        source=f"measured on this machine with torch, {threads or before} threads, {dtype}",
    )


def _best(run: Callable[[], object]) -> float:
    """The fewest seconds of a call."""
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best
