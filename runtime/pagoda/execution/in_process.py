"""The executor of a single rank."""

from __future__ import annotations

import queue

import torch
from typing_extensions import override

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.errors import EngineDeadError
from pagoda.execution.adapter_loading import AdapterLoader, AdapterRead
from pagoda.execution.encoder_worker import EncoderWorker
from pagoda.execution.executor import (
    AdapterOutcome,
    Executor,
    FailedStep,
    KVBudget,
    RankLoadListener,
    StartupPhases,
    StepHandle,
)
from pagoda.execution.kernel_recorder import KernelRecorder
from pagoda.execution.model_runner import ModelRunner
from pagoda.execution.traced_kernel import Kernels
from pagoda.execution.worker import Worker
from pagoda.models.config import ModelConfig
from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.pooling_config import read_pooler
from pagoda.parallel.rank_health import RankHealth
from pagoda.platform.threads import bind_compute_threads
from pagoda.scheduling.plan import StepPlan, StepResult


class InProcessExecutor(Executor):
    """The executor of a single rank, in the calling process."""

    def __init__(self, config: PagodaConfig, model_config: ModelConfig | EncoderConfig) -> None:
        self._worker = _worker_of(config, model_config)
        self._dead: str | None = None
        self._loader: AdapterLoader | None = None
        self._read_adapters: queue.SimpleQueue[AdapterRead] = queue.SimpleQueue()
        # On a GPU a step is only queued by `submit`, so the next one is made meanwhile. On a CPU it is done by then.
        self.max_concurrent_batches = 2 if self._worker.device.type == "cuda" else 1

    @property
    def runner(self) -> ModelRunner:
        """The model runner, which is in this process; from `initialize_kv_cache` until `shutdown`."""
        if self._worker.runner is None:
            raise RuntimeError("the executor has no model runner: its KV cache is not initialized, or it was shut down")
        return self._worker.runner

    @override
    def record_kernels(self) -> Kernels:
        return KernelRecorder()

    @override
    def connect(self, phases: StartupPhases) -> None:
        pass  # a single rank

    @override
    def load(self, progress: RankLoadListener | None = None) -> None:
        if self._worker.device.type == "cpu":
            bind_compute_threads(self._worker.config.cpu_thread_affinity, self._worker.config.threads)
        self._worker.load(None if progress is None else lambda _, done, total: progress("", done, total))
        if self._worker.adapters is not None:
            self._loader = AdapterLoader(self._worker.adapters, self._read_adapters.put)

    @override
    def kv_budget(self, block_size: int) -> KVBudget:
        return KVBudget(self._worker.kv_block_bytes(block_size), self._worker.available_kv_bytes())

    @override
    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        self._worker.initialize_kv_cache(num_blocks, max_model_len)

    @override
    def release(self, level: int) -> None:
        self._close_loader()
        self._worker.release(level)

    @override
    def submit(self, plan: StepPlan) -> StepHandle:
        try:
            return _InProcessStep(self, self._worker.execute(plan))
        except Exception as error:  # the handle raises it
            self.note_error(error)
            return FailedStep(error)

    @override
    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        assert self._loader is not None, "the model is served without adapters"
        self._loader.start(slot, adapter)

    @override
    def unload_adapter(self, slot: int) -> None:
        if self._worker.adapters is not None:
            self._worker.adapters.remove(slot)

    @override
    def take_loaded_adapters(self, timeout: float) -> list[AdapterOutcome]:
        outcomes: list[AdapterOutcome] = []
        while self._loader is not None:
            try:
                read = self._read_adapters.get(timeout > 0 and not outcomes, timeout or None)
            except queue.Empty:
                break
            outcomes.append(AdapterOutcome(read.adapter, self._loader.install(read)))
        return outcomes

    @override
    def check_health(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    @override
    def ranks(self) -> list[RankHealth]:
        return []

    @override
    def shutdown(self) -> None:
        self._dead = self._dead or "the executor was shut down"
        self._close_loader()
        self._worker.shutdown()

    def _close_loader(self) -> None:
        """It holds the model."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def note_error(self, error: Exception) -> None:
        """Remember an error after which the device does nothing more: CUDA keeps its context broken."""
        if isinstance(error, torch.AcceleratorError):
            self._dead = f"the device failed: {error}"


def _worker_of(config: PagodaConfig, model_config: ModelConfig | EncoderConfig) -> Worker | EncoderWorker:
    if isinstance(model_config, ModelConfig):
        return Worker(config, model_config)
    assert config.model is not None
    pooler = read_pooler(config, config.model, model_config)
    assert pooler is not None, "an encoder pools"
    return EncoderWorker(config, model_config, pooler)


class _InProcessStep:
    """A queued step; `result` waits for the device."""

    def __init__(self, executor: InProcessExecutor, pending: StepHandle) -> None:
        self._executor = executor
        self._pending = pending

    def result(self) -> StepResult:
        try:
            return self._pending.result()
        except Exception as error:  # raised on, once it is known whether the device survived it
            self._executor.note_error(error)
            raise
