"""Engines for the parts: configurations without weights in the shapes of known models, and a loop that keeps an account."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.context import Context
from pagoda.config.sources import from_kwargs
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.execution.executor import Executor, StepHandle
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import StepPlan, StepResult

_QWEN3 = DummySpec(
    family="qwen3", head_dim=128, num_heads=8, num_kv_heads=8, vocab_size=151_936, dtype="bfloat16", rope_theta=1e6
)

# Shapes as published; weights are random.
MODELS = {
    "Qwen3-0.6B": replace(
        _QWEN3, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tie_word_embeddings=True
    ),
    "Qwen3-8B": replace(_QWEN3, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32),
    "Qwen3-14B": replace(_QWEN3, hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40),
}
TINY = DummySpec(num_layers=2, max_position_embeddings=256)


def spec_of(context: Context, name: str) -> DummySpec:
    """The model `name`, long enough for the workloads; a tiny one in a dry run."""
    return context.choose(replace(MODELS[name], max_position_embeddings=32768), TINY)


@contextmanager
def engine(context: Context, name: str, **settings: Any) -> Iterator[EngineCore]:
    """An engine with random weights in the shape of `name`, in this process."""
    folder = context.scratch / "models" / name
    if not folder.exists():
        write_dummy_checkpoint(folder, spec_of(context, name), weights=False)
    core = start_core(configuration(context, folder, load_format="dummy", **settings))
    try:
        yield core
    finally:
        core.shutdown()
        context.release()


def configuration(context: Context, folder: Path, **settings: Any) -> Any:
    """Settings that the parts share; in a dry run those of a tiny engine on the CPU."""
    shared: dict[str, Any] = context.choose(
        {"device": "cuda", "max_model_len": 4096, "max_num_seqs": 256},
        {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "max_model_len": 96,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 22,
        },
    )
    return from_kwargs({"model": str(folder), "enable_prefix_caching": False, **shared, **settings})


def workload(context: Context, count: int, vocab_size: int) -> list[EngineRequest]:
    """`count` requests of 100 to 1024 random tokens in and 100 to 1024 out, to the full length; seed 0."""
    rng = random.Random(0)
    low, high = context.choose((100, 1024), (4, 12))
    return [
        EngineRequest(
            request_id=f"request-{number}",
            prompt_token_ids=rng.choices(range(vocab_size), k=rng.randint(low, high)),
            params=SamplingParams(temperature=0.6, seed=number, ignore_eos=True, max_tokens=length),
            max_tokens=length,
            arrival_time=time.monotonic(),
        )
        for number, length in ((number, rng.randint(low, high)) for number in range(count))
    ]


@dataclass
class StepAccount:
    """Of the steps of an engine: their number, and how long the host waited for the device, and in how many of them at all.

    A step whose result is there already when the host asks is one that the device finished first: it may have been idle. In
    one that the host waits for, the host's own work was hidden behind the device's.

    `marks`: of each step on a GPU, when the device came to its first piece of work and was done with its last. Between two
    steps it had nothing to do.
    """

    steps: int = 0
    waited_seconds: float = 0.0
    steps_waited: int = 0
    started: float = field(default_factory=time.perf_counter)
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def report(self) -> dict[str, float | None]:
        """Per step, and as shares."""
        seconds = time.perf_counter() - self.started
        steps = max(1, self.steps)
        return {
            "steps": self.steps,
            "seconds": seconds,
            "milliseconds_per_step": 1000 * seconds / steps,
            "cpu_milliseconds_per_step": 1000 * (seconds - self.waited_seconds) / steps,
            "share_of_steps_hidden_behind_the_device": self.steps_waited / steps,
            "share_of_time_the_device_was_idle": self._idle_seconds() / seconds if self.marks else None,
        }

    def _idle_seconds(self) -> float:
        self.marks[-1][1].synchronize()
        gaps = (ended.elapsed_time(began) for (_, ended), (began, _) in itertools.pairwise(self.marks))
        return sum(max(0.0, gap) for gap in gaps) / 1000


class AccountedExecutor:
    """An executor that passes everything on and keeps a `StepAccount`."""

    # Less is no waiting, only the call.
    LEAST_WAIT = 20e-6

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.account = StepAccount()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Submit; the handle's waiting is counted."""
        if not torch.cuda.is_available():
            return _AccountedHandle(self._executor.submit(plan), self.account)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        handle = self._executor.submit(plan)
        ended.record()
        self.account.marks.append((began, ended))
        return _AccountedHandle(handle, self.account)


class _AccountedHandle:
    def __init__(self, handle: StepHandle, account: StepAccount) -> None:
        self._handle, self._account = handle, account

    def result(self) -> StepResult:
        began = time.perf_counter()
        result = self._handle.result()
        waited = time.perf_counter() - began
        self._account.steps += 1
        self._account.waited_seconds += waited
        self._account.steps_waited += waited > AccountedExecutor.LEAST_WAIT
        return result


def keep_account(core: EngineCore) -> AccountedExecutor:
    """Put an `AccountedExecutor` into `core`."""
    accounted = AccountedExecutor(core._executor)
    core._executor = accounted
    return accounted


def run_all(core: EngineCore, requests: list[EngineRequest], tokens_of: dict[str, list[int]] | None = None) -> int:
    """Run the requests to their ends; the number of tokens generated. Raises RuntimeError for one that fails.

    `tokens_of`: lists by request id, to which the tokens are appended.
    """
    for request in requests:
        core.add_request(request)
    tokens = 0
    while core.has_work:
        for output in core.step().outputs:
            if output.error:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
            tokens += len(output.new_token_ids)
            if tokens_of is not None:
                tokens_of[output.request_id] += output.new_token_ids
    return tokens
