"""The rows of the comparison: what each measures, in full and in the quick form, and the goals."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from harness.measure import Case

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32
KV_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`figure`: the key of a run's result that counts. `case`: without prompts' seed and vocabulary."""

    name: str
    figure: str
    unit: str
    higher_is_better: bool
    case: Case


def _batch(batch_size: int, input_tokens: int, output_tokens: int, **further: int) -> Case:
    return Case(
        kind="batch",
        batch_size=batch_size,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        vocab_size=0,
        seed=0,
        **further,
    )


def rows(*, quick: bool) -> dict[str, Row]:
    """All rows by name. The quick form has shorter prompts where only decode counts, and fewer tokens."""
    decode = {1: 24, 8: 20, 32: 12} if quick else {1: 64, 8: 64, 32: 48}
    prompt = 32 if quick else 128
    found = [
        Row(
            name=f"decode-{size}",
            figure="decode_tokens_per_second",
            unit="tok/s",
            higher_is_better=True,
            case=_batch(size, prompt, tokens),
        )
        for size, tokens in decode.items()
    ]
    found += [
        Row(
            name=f"prefill-{size}x{length}",
            figure="prefill_tokens_per_second",
            unit="tok/s",
            higher_is_better=True,
            case=_batch(size, length, 1),
        )
        for size, length in ((1, 1024), (8, 128))
    ]
    found.append(
        Row(
            name="shared-prefix",
            figure="requests_per_second",
            unit="req/s",
            higher_is_better=True,
            case=_batch(8 if quick else 24, 544, 8, shared_tokens=512, num_prefixes=1 if quick else 3),
        )
    )
    return {row.name: row for row in found}


def capacity_case(*, quick: bool) -> Case:
    """All requests at once: what gets through when nothing waits to arrive."""
    return _batch(16 if quick else 32, 128, 32)


def online_case(*, quick: bool, rate: float, seed: int) -> Case:
    """Poisson arrivals at `rate` requests a second."""
    rng = random.Random(seed)
    count = 20 if quick else 60
    offsets, now = [], 0.0
    for _ in range(count):
        offsets.append(now)
        now += rng.expovariate(rate)
    return replace(capacity_case(quick=quick), kind="arrivals", batch_size=count, offsets=tuple(offsets))


ONLINE_SHARE = 0.8
ONLINE_FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
MAIN_ROWS = ("decode-1", "decode-8", "decode-32", "prefill-1x1024", "prefill-8x128")
EXTRA_ROWS = ("load", "memory", "online", "shared-prefix")
UNCACHED = "pagoda-uncached"
"""Pagoda without prefix caching, for the row `shared-prefix` alone."""

# Least ratio of Pagoda to the best peer, by model, weights and row; to Pagoda without prefix caching in `shared-prefix`.
GOALS = {
    ("qwen3-0.6b", "bf16", "decode-1"): 1.3,
    ("qwen3-0.6b", "bf16", "decode-8"): 1.5,
    ("qwen3-0.6b", "bf16", "decode-32"): 1.3,
    ("qwen3-0.6b", "bf16", "prefill-1x1024"): 1.1,
    ("qwen3-0.6b", "bf16", "prefill-8x128"): 1.1,
    ("qwen3-0.6b", "int8", "decode-1"): 1.6,
    ("qwen3-0.6b", "int8", "decode-8"): 1.6,
    ("qwen3-0.6b", "int8", "decode-32"): 1.5,
    ("qwen3-0.6b", "int8", "prefill-1x1024"): 1.2,
    ("qwen3-0.6b", "int8", "prefill-8x128"): 1.2,
    ("llama-15m", "bf16", "decode-1"): 1.0,
    ("llama-15m", "bf16", "decode-8"): 1.0,
    ("llama-15m", "bf16", "decode-32"): 1.0,
    ("qwen3-0.6b", "bf16", "online ttft_p99_ms"): 1.0,
    ("qwen3-0.6b", "bf16", "online itl_p99_ms"): 1.0,
    ("qwen3-0.6b", "bf16", "shared-prefix"): 3.0,
}
