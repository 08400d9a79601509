"""How the engine runs steps, whatever the ranks are and wherever they live."""

from __future__ import annotations

from typing import Protocol

import torch

from pagoda.config.schema import PagodaConfig
from pagoda.errors import EngineDeadError, NotSupportedError
from pagoda.execution.worker import Worker
from pagoda.models.config import ModelConfig
from pagoda.models.loader import Progress
from pagoda.scheduling.plan import StepPlan, StepResult


class StepHandle(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what went wrong with the step as a whole; the next plan can be run after that."""


class Executor(Protocol):
    """All ranks of one model. Called from one thread, in this order: `load`, `available_kv_bytes`, `initialize_kv_cache`.

    `max_concurrent_batches`: how many steps may be submitted before the first one's result is taken. Results are taken in
    the order of submission.
    """

    max_concurrent_batches: int

    def load(self, progress: Progress | None = None) -> None:
        """Set up the devices and load the weights. Raises `CheckpointError`."""

    def kv_block_bytes(self, block_size: int) -> int:
        """Bytes of a KV block of `block_size` tokens in all layers, on the rank where it is largest."""

    def available_kv_bytes(self) -> int:
        """Bytes that the KV cache may take, on the rank where they are fewest."""

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate the KV cache, block 0 included, and run a first step. Nothing that grows is allocated after this.

        `max_model_len`: the longest sequence, where it was fitted to the KV cache; None: as configured, else the model's.
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Does not raise for a failing step: its handle does."""

    def check_health(self) -> None:
        """Raise `EngineDeadError` if no further step can run."""

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

    def load(self, progress: Progress | None = None) -> None:
        """See `Executor`."""
        self._worker.load(progress)

    def kv_block_bytes(self, block_size: int) -> int:
        """See `Executor`."""
        return self._worker.kv_block_bytes(block_size)

    def available_kv_bytes(self) -> int:
        """See `Executor`."""
        return self._worker.available_kv_bytes()

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """See `Executor`."""
        self._worker.initialize_kv_cache(num_blocks, max_model_len)

    def submit(self, plan: StepPlan) -> StepHandle:
        """See `Executor`."""
        try:
            return _InProcessStep(self, self._worker.execute(plan))
        except Exception as error:
            self.note_error(error)
            return FailedStep(error)

    def check_health(self) -> None:
        """See `Executor`."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)

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
        except Exception as error:
            self._executor.note_error(error)
            raise


def create_executor(config: PagodaConfig, model_config: ModelConfig) -> Executor:
    """The executor that the configuration asks for. Raises `NotSupportedError` for more than one rank."""
    if config.tensor_parallel_size * config.pipeline_parallel_size != 1:
        raise NotSupportedError(
            f"tensor_parallel_size={config.tensor_parallel_size}, pipeline_parallel_size={config.pipeline_parallel_size}: "
            "only one rank is supported"
        )
    return InProcessExecutor(config, model_config)
