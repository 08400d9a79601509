"""Offline throughput: 256 requests of 100 to 1024 tokens in and out, random weights, to their full lengths."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine, keep_account, run_all, workload

GOALS = {"Qwen3-0.6B": 24_000, "Qwen3-8B": 9_000, "Qwen3-14B": 5_800}
CEILINGS = {"Qwen3-0.6B": 39_000, "Qwen3-8B": 12_600, "Qwen3-14B": 8_100}
Models = tuple[tuple[str, dict[str, Any]], ...]
"""Name, and settings beside those of all."""
MODELS: Models = (("Qwen3-8B", {}), ("Qwen3-0.6B", {}))
SECONDS_OF_A_MODEL = 35


def run(context: Context) -> dict[str, Any]:
    """The models of the goals that matter most."""
    return measure(context, MODELS)


def measure(context: Context, models: Models) -> dict[str, Any]:
    """Output tokens a second, and what the host did in the meantime."""
    for name, settings in context.choose(models, (("Qwen3-0.6B", {}),)):
        label = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])
        if context.seconds_left() < SECONDS_OF_A_MODEL and not context.dry_run:
            context.keep({"model": label, "status": "no time left"})
            continue
        with engine(context, name, **settings) as core:
            run_all(core, workload(context, context.choose(16, 2), core.ready.vocab_size))  # warms up
            executor = keep_account(core)
            tokens = run_all(core, workload(context, context.choose(256, 4), core.ready.vocab_size))
            report = executor.account.report()
            entry = {
                "model": label,
                "output_tokens": tokens,
                "output_tokens_per_second": tokens / report["seconds"],
                "goal": GOALS[name] if not settings else None,
                "ceiling_by_bandwidth": CEILINGS[name] if not settings else None,
                "phase_seconds": core.ready.phase_seconds,
                "kv_equation": core.ready.kv_equation,
                **report,
            }
        context.keep(entry)
    headline = {entry["model"]: round(entry.get("output_tokens_per_second", 0)) for entry in context.entries}
    return {"results": context.entries, "headline": headline}
