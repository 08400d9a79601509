"""Where a step's time goes: the kernels that take longest, in decode steps of several sizes and in one of a whole prompt."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.context import Context
from benchmarks.gpu.engines import engine
from pagoda.engine.core.loop import EngineCore
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams

MODEL = "Qwen3-0.6B"
NUM_STEPS, NUM_KERNELS = 10, 25


def run(context: Context) -> dict[str, Any]:
    """Decode steps of 1, 64 and 256 rows behind 512 tokens each, then steps of 8192 prompt tokens."""
    length = context.choose(512, 8)
    with engine(context, MODEL, max_num_batched_tokens=context.choose(8192, 64)) as core:
        for rows in context.choose((1, 64, 256), (1, 2)):
            add(core, rows, length, num_output=2 * NUM_STEPS + 8)
            until_all_decode(core, rows)
            context.keep({"step": f"decode, {rows} rows", **profiled(context, core)})
            finish(core)
        add(core, context.choose(16, 2), context.choose(4000, 40), num_output=1)
        core.step()
        context.keep({"step": "prefill", **profiled(context, core, num_steps=context.choose(4, 1))})
        finish(core)
    headline = {entry["step"]: round(entry["milliseconds"], 3) for entry in context.entries}
    return {"model": MODEL, "results": context.entries, "headline": headline}


def add(core: EngineCore, count: int, length: int, *, num_output: int) -> None:
    """Add `count` requests of `length` tokens that sample as Qwen3's generation config says."""
    for number in range(count):
        params = SamplingParams(
            temperature=0.6, top_k=20, top_p=0.95, seed=number, ignore_eos=True, max_tokens=num_output
        )
        prompt = [(7 * number + 13 * place) % 500 for place in range(length)]
        core.add_request(
            EngineRequest(
                request_id=f"profile-{number}-{length}-{count}",
                prompt_token_ids=prompt,
                params=params,
                max_tokens=num_output,
                arrival_time=time.monotonic(),
            )
        )


def until_all_decode(core: EngineCore, count: int) -> None:
    """Run until `count` requests have four tokens each."""
    generated: Counter[str] = Counter()
    while len(generated) < count or min(generated.values()) < 4:
        for output in core.step().outputs:
            generated[output.request_id] += len(output.new_token_ids)


def profiled(context: Context, core: EngineCore, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Milliseconds a step and the longest kernels of it, each with its time and number of calls a step."""
    is_cuda = context.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    context.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(num_steps):
            core.step()
        context.synchronize()
        seconds = time.perf_counter() - began
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    kernels = [
        {
            "name": event.key[:120],
            "microseconds": getattr(event, key) / num_steps,
            "calls": event.count / num_steps,
        }
        for event in events[:NUM_KERNELS]
    ]
    busy = sum(getattr(event, key) for event in events) / num_steps
    return {"milliseconds": 1000 * seconds / num_steps, "device_microseconds": busy, "kernels": kernels}


def finish(core: EngineCore) -> None:
    """Run until nothing is left."""
    while core.has_work:
        core.step()
