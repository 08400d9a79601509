"""Nothing is allocated on the device after ready: what the allocator holds before and after a workload."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine, run_all, workload

# The driver loads the code of a kernel when it first runs, as may happen in some steps only.
MOST_CODE_BYTES = 64 << 20
# Four segments of the allocator's pool of small tensors.
MOST_GROWN_BYTES = 8 << 20


def run(context: Context) -> dict[str, Any]:
    """Reserved bytes after ready and at their greatest afterwards, and what the driver still has free."""
    with engine(context, "Qwen3-0.6B") as core:
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = _memory(context)
        run_all(core, workload(context, context.choose(64, 3), core.ready.vocab_size))
        context.synchronize()
        after = _memory(context)
        equation = core.ready.kv_equation
    grown = after["most_reserved"] - before["reserved"]
    return {
        "before": before,
        "after": after,
        "kv_equation": equation,
        "passed": grown <= MOST_GROWN_BYTES and before["free"] - after["free"] <= MOST_CODE_BYTES,
        "headline": {
            "bytes_reserved_after_ready": grown,
            "bytes_taken_from_the_driver": before["free"] - after["free"],
        },
    }


def _memory(context: Context) -> dict[str, int]:
    if context.device.type != "cuda":
        return {"reserved": 0, "most_reserved": 0, "free": 0}
    return {
        "reserved": torch.cuda.memory_reserved(),
        "most_reserved": torch.cuda.max_memory_reserved(),
        "free": torch.cuda.mem_get_info()[0],
    }
