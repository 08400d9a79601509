"""The same workload with a model that is larger, and with a float8 cache, for which no goal was set."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.workload import Models, measure

MODELS: Models = (("Qwen3-14B", {}), ("Qwen3-8B", {"kv_cache_dtype": "fp8"}))


def run(context: Context) -> dict[str, Any]:
    """See `workload.measure`."""
    return measure(context, MODELS)
