"""Requests that arrive by chance, at 50, 80 and 95 % of the rate that the engine can bear: how long each waits."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine, keep_account, run_all, workload
from pagoda.engine.core.loop import EngineCore
from pagoda.request import EngineRequest

MODEL = "Qwen3-8B"
SHARES = (0.5, 0.8, 0.95)


def run(context: Context) -> dict[str, Any]:
    """Percentiles of time to first token and of inter-token latency; the peak is measured first."""
    count = context.choose(96, 3)
    with engine(context, MODEL) as core:
        requests = workload(context, count, core.ready.vocab_size)
        began = time.perf_counter()
        run_all(core, requests)
        peak = count / (time.perf_counter() - began)
        for share in SHARES:
            if context.seconds_left() < count / peak + 10 and not context.dry_run:
                context.keep({"share_of_peak": share, "status": "no time left"})
                continue
            again = [replace(request, request_id=f"{request.request_id} at {share}") for request in requests]
            context.keep({"share_of_peak": share, **_serve(core, again, share * peak)})
    return {
        "model": MODEL,
        "peak_requests_per_second": peak,
        "results": context.entries,
        "headline": next((entry for entry in context.entries if entry["share_of_peak"] == 0.8), None),
    }


def _serve(core: EngineCore, requests: list[EngineRequest], rate: float) -> dict[str, Any]:
    rng = random.Random(0)
    executor = keep_account(core)
    began = time.monotonic()
    moments = np.cumsum([rng.expovariate(rate) for _ in requests])
    arrivals = {request.request_id: began + moment for request, moment in zip(requests, moments, strict=True)}
    waiting = list(reversed(requests))
    first, last, gaps = {}, {}, []
    while waiting or core.has_work:
        while waiting and arrivals[waiting[-1].request_id] <= time.monotonic():
            core.add_request(replace(waiting[-1], arrival_time=arrivals[waiting[-1].request_id]))
            waiting.pop()
        if not core.has_work:
            time.sleep(max(0.0, arrivals[waiting[-1].request_id] - time.monotonic()))
            continue
        outputs = core.step().outputs
        now = time.monotonic()
        for output in outputs:
            if not output.new_token_ids:
                continue
            name = output.request_id
            if name in last:
                gaps.append(now - last[name])
            first.setdefault(name, now - arrivals[name])
            last[name] = now
    return {
        "requests_per_second": rate,
        "time_to_first_token_ms": _percentiles(list(first.values())),
        "inter_token_latency_ms": _percentiles(gaps),
        **executor.account.report(),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) for q in (50, 90, 99)} if seconds else {}
