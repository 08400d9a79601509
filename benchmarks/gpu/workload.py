"""Offline throughput: 256 requests of 100 to 1024 tokens in and out, random weights, to their full lengths."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine, keep_account, run_all, workload

GOALS = {"Qwen3-0.6B": 24_000, "Qwen3-8B": 9_000, "Qwen3-14B": 5_800}
CEILINGS = {"Qwen3-0.6B": 39_000, "Qwen3-8B": 12_600, "Qwen3-14B": 8_100}
SECONDS_OF_A_MODEL = 60


def run(context: Context) -> dict[str, Any]:
    """Output tokens a second, and what the host did in the meantime."""
    found: dict[str, Any] = {}
    for name in context.choose(list(GOALS), ["Qwen3-0.6B"]):
        if context.seconds_left() < SECONDS_OF_A_MODEL and not context.dry_run:
            found[name] = {"status": "no time left"}
            continue
        with engine(context, name) as core:
            run_all(core, workload(context, context.choose(16, 2), core.ready.vocab_size))  # warms up
            executor = keep_account(core)
            tokens = run_all(core, workload(context, context.choose(256, 4), core.ready.vocab_size))
            report = executor.account.report()
            found[name] = {
                "output_tokens": tokens,
                "output_tokens_per_second": tokens / report["seconds"],
                "goal": GOALS[name],
                "ceiling_by_bandwidth": CEILINGS[name],
                "stage_seconds": core.ready.stage_seconds,
                "kv_equation": core.ready.kv_equation,
                **report,
            }
        print(f"  {name}: {found[name]}", flush=True)
    return {"models": found, "headline": {n: round(f.get("output_tokens_per_second", 0)) for n, f in found.items()}}
