"""The measurements, made of an engine's events. Imports the standard library only."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from harness.engine import Engine, Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one run does. `seed` makes its prompts, the same for every engine.

    `kind`: `batch` (all prompts at once), or `arrivals` (at `offsets`, seconds from the start). The first `shared_tokens` of
    the prompts are equal within each of `num_prefixes` groups.
    """

    kind: str
    batch_size: int
    input_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int
    shared_tokens: int = 0
    num_prefixes: int = 1
    offsets: tuple[float, ...] = ()

    def prompts(self) -> list[list[int]]:
        """Random token ids."""
        rng = random.Random(self.seed)
        ids = range(10, self.vocab_size)
        prefixes = [rng.choices(ids, k=self.shared_tokens) for _ in range(self.num_prefixes)]
        own = self.input_tokens - self.shared_tokens
        return [prefixes[number % self.num_prefixes] + rng.choices(ids, k=own) for number in range(self.batch_size)]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_case(engine: Engine, case: Case) -> dict[str, Any]:
    """Run `case`; the figures, by name, and the ids of the first sequence."""
    prompts = case.prompts()
    if case.kind == "arrivals":
        return _arrivals_figures(engine, prompts, case)
    events = engine.run_batch(prompts, case.output_tokens)
    return batch_figures(events, case)


def batch_figures(events: list[Event], case: Case) -> dict[str, Any]:
    """Rates of a batch.

    Prefill lasts until every sequence has its first token. Decode is measured from there until the first sequence is done, so
    that the batch is full all the time.
    """
    counts = dict.fromkeys(range(case.batch_size), 0)
    began, ended = events[0].time, events[-1].time
    prefilled = full_until = None
    decoded = 0
    for event in events[1:]:
        for request_id, tokens in event.tokens.items():
            counts[request_id] += len(tokens)
        if prefilled is not None and full_until is None:
            decoded += sum(map(len, event.tokens.values()))
        if prefilled is None and min(counts.values()) > 0:
            prefilled = event.time
        if full_until is None and max(counts.values()) >= case.output_tokens:
            full_until = event.time
    short = {request_id: count for request_id, count in counts.items() if count != case.output_tokens}
    if prefilled is None or full_until is None or short:
        raise RuntimeError(f"sequences of another length than {case.output_tokens}: {short}")
    figures: dict[str, Any] = {
        "seconds": ended - began,
        "prefill_tokens_per_second": case.batch_size * case.input_tokens / (prefilled - began),
        "requests_per_second": case.batch_size / (ended - began),
        "first_ids": [token for event in events for token in event.tokens.get(0, ())],
    }
    if decoded and full_until > prefilled:
        figures["decode_tokens_per_second"] = decoded / (full_until - prefilled)
    return figures


def _arrivals_figures(engine: Engine, prompts: list[list[int]], case: Case) -> dict[str, Any]:
    """Latencies under arrivals, each from the planned moment, whatever the engine was doing then."""
    began = time.perf_counter()
    seen: dict[int, list[float]] = {number: [] for number in range(case.batch_size)}
    next_one = 0
    while next_one < case.batch_size or engine.has_work:
        now = time.perf_counter() - began
        while next_one < case.batch_size and case.offsets[next_one] <= now:
            engine.add(next_one, prompts[next_one], case.output_tokens)
            next_one += 1
        if engine.has_work:
            tokens = engine.step()
            moment = time.perf_counter() - began
            for request_id in tokens:
                seen[request_id].append(moment)
        else:
            time.sleep(max(0.0, case.offsets[next_one] - now))
    firsts = [times[0] - case.offsets[number] for number, times in seen.items()]
    gaps = [later - earlier for times in seen.values() for earlier, later in pairwise(times)]
    last = max(times[-1] for times in seen.values())
    return {
        "ttft_p50_ms": 1000 * quantile(firsts, 0.5),
        "ttft_p99_ms": 1000 * quantile(firsts, 0.99),
        "itl_p50_ms": 1000 * quantile(gaps, 0.5),
        "itl_p99_ms": 1000 * quantile(gaps, 0.99),
        "requests_per_second": case.batch_size / last,
    }


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
