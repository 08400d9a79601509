"""How the engine runs steps, whatever the ranks are and wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.rank_health import RankHealth
from pagoda.errors import EngineDeadError
from pagoda.execution.model_runner import ModelRunner
from pagoda.execution.worker import Worker
from pagoda.models.config import ModelConfig
from pagoda.platform.thread_binding import bind_compute_threads
from pagoda.scheduling.plan import StepPlan, StepResult

LoadProgress = Callable[[str, int, int], None]
"""Told of bytes done and in all, of the rank named first (empty: there is one); from the thread that loads."""


class Stages(Protocol):
    """The start-up as others see it."""

    def enter(self, name: str, detail: str = "") -> AbstractContextManager[None]:
        """A stage that lasts as long as the context; `detail` is for people."""

    def detail(self, text: str) -> None:
        """What the present stage is at, for people."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Room for KV blocks on the rank that has least of it: bytes of a block in the layers of that rank, and bytes for all.

    `note` says which rank that is, for people; empty when there is only one.
    """

    block_bytes: int
    available_bytes: int
    note: str = ""


class StepHandle(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what went wrong with the step as a whole; the next plan can be run after that."""


class Executor(Protocol):
    """All ranks of one model. Called from one thread, in this order: `connect`, `load`, `kv_budget`, `initialize_kv_cache`.

    `max_concurrent_batches`: how many steps may be submitted before the first one's result is taken. Results are taken in
    the order of submission.
    """

    max_concurrent_batches: int

    def connect(self, stages: Stages) -> None:
        """Bring several ranks together, in stages `launch`, `rendezvous` and `communication`; a single rank has none.

        Raises a `PagodaError` that names the rank, its host and what to do.
        """

    def load(self, progress: LoadProgress | None = None) -> None:
        """Set up the devices and load the weights. Raises `CheckpointError`."""

    def kv_budget(self, block_size: int) -> KVBudget:
        """Room for KV blocks of `block_size` tokens, with the weights in place."""

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate the KV cache, block 0 included, and run a first step. Nothing that grows is allocated after this.

        `max_model_len`: the longest sequence, where it was fitted to the KV cache; None: as configured, else the model's.
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Does not raise for a failing step: its handle does."""

    def check_health(self) -> None:
        """Raise `EngineDeadError` if no further step can run."""

    def ranks(self) -> list[RankHealth]:
        """The processes of the ranks; empty when there are none but the caller's."""

    def shutdown(self) -> None:
        """Give back what the ranks hold. May be called twice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed only because the device had no memory for it: a smaller one may fit."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class FailedStep:
    """The handle of a step that failed before it was under way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        """Raise what went wrong."""
        raise self._error


class InProcessExecutor:
    """The executor of a single rank, in the calling process."""

    def __init__(self, config: PagodaConfig, model_config: ModelConfig) -> None:
        self._worker = Worker(config, model_config)
        self._dead: str | None = None
        # On a GPU a step is only queued by `submit`, so the next one is made meanwhile. On a CPU it is done by then.
        self.max_concurrent_batches = 2 if self._worker.device.type == "cuda" else 1

    @property
    def runner(self) -> ModelRunner:
        """The model runner, which is in this process; from `initialize_kv_cache` until `shutdown`."""
        if self._worker.runner is None:
            raise RuntimeError("the executor has no model runner: its KV cache is not initialized, or it was shut down")
        return self._worker.runner

    def connect(self, stages: Stages) -> None:
        """See `Executor`."""

    def load(self, progress: LoadProgress | None = None) -> None:
        """See `Executor`."""
        if self._worker.device.type == "cpu":
            bind_compute_threads(self._worker.config)
        self._worker.load(None if progress is None else lambda _, done, total: progress("", done, total))

    def kv_budget(self, block_size: int) -> KVBudget:
        """See `Executor`."""
        return KVBudget(self._worker.kv_block_bytes(block_size), self._worker.available_kv_bytes())

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """See `Executor`."""
        self._worker.initialize_kv_cache(num_blocks, max_model_len)

    def submit(self, plan: StepPlan) -> StepHandle:
        """See `Executor`."""
        try:
            return _InProcessStep(self, self._worker.execute(plan))
        except Exception as error:  # none is lost: the handle raises it
            self.note_error(error)
            return FailedStep(error)

    def check_health(self) -> None:
        """See `Executor`."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def ranks(self) -> list[RankHealth]:
        """See `Executor`."""
        return []

    def shutdown(self) -> None:
        """See `Executor`."""
        self._dead = self._dead or "the executor was shut down"
        self._worker.shutdown()

    def note_error(self, error: Exception) -> None:
        """Remember an error after which the device does nothing more: CUDA keeps its context broken."""
        if isinstance(error, torch.AcceleratorError):
            self._dead = f"the device failed: {error}"


class _InProcessStep:
    """A step on its way; the result is there when the device is done."""

    def __init__(self, executor: InProcessExecutor, pending: StepHandle) -> None:
        self._executor = executor
        self._pending = pending

    def result(self) -> StepResult:
        try:
            return self._pending.result()
        except Exception as error:  # raised on, once it is known whether the device survived it
            self._executor.note_error(error)
            raise


def create_executor(config: PagodaConfig, model_config: ModelConfig) -> Executor:
    """The executor that the configuration asks for. Raises `ConfigError` for one that this machine cannot have."""
    backend = config.distributed_executor_backend
    if backend == "auto" and config.ray_address is not None:
        backend = "ray"
    if backend == "auto" and config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        backend = "mp"
    if backend == "auto":
        return InProcessExecutor(config, model_config)
    if backend == "mp":
        # Imported here: it needs msgspec, which a single rank does without.
        from pagoda.distributed.multi_process import multi_process_executor

        return multi_process_executor(config, model_config)
    from pagoda.distributed.ray.executor import ray_executor

    return ray_executor(config, model_config)
