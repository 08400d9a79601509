"""Processes that are ranks of one layout after another: importing torch costs seconds, so they start once for many cases.

    with RankPool(4) as pool:
        executor = PooledExecutor(pool, config, model_config)     # the first `world_size` processes become its ranks

The engine's own executors start processes for every engine; this one is for tests of what the ranks compute.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.execution.executor import KVBudget, RankLoadListener, StepHandle
from pagoda.models.config import ModelConfig
from pagoda.parallel.layout import ParallelLayout
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.sampled_tokens_update import SampledTokensTracker

TIMEOUT_SECONDS = 150.0


class RankPool:
    """`size` processes, each obeying one caller: `call` has one do something and waits, `send` and `take` do it apart."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def send(self, rank: int, name: str, *args: Any) -> None:
        """Have a rank do `_Rank.name(*args)`; it does one thing after another."""
        self._pipes[rank].send((name, args))

    def take(self, rank: int) -> Any:
        """The oldest answer of a rank that was not taken yet; raises what went wrong there."""
        if not self._pipes[rank].poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_SECONDS:g} s")
        answer = self._pipes[rank].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call_all(self, num_ranks: int, name: str, *args: Any) -> list[Any]:
        """Have the first `num_ranks` ranks do the same, side by side."""
        for rank in range(num_ranks):
            self.send(rank, name, *args)
        return [self.take(rank) for rank in range(num_ranks)]


def _serve(pipe: Connection) -> None:
    rank = _Rank()
    while (command := pipe.recv()) is not None:
        name, args = command
        try:
            answer = getattr(rank, name)(*args)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(answer)
    os._exit(0)  # without waiting for the threads of torch


class _Rank:
    """What runs in a process of the pool."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.listener: socket.socket | None = None

    def listen(self) -> int:
        """Open the port at which ranks meet; only rank 0 does."""
        from pagoda.parallel.interfaces import listen_on

        self.listener = listen_on("127.0.0.1")
        return int(self.listener.getsockname()[1])

    def start(
        self, config: PagodaConfig, model_config: ModelConfig, layout: ParallelLayout, port: int, rank: int
    ) -> None:
        import torch

        from pagoda.execution.worker import Worker
        from pagoda.parallel import groups

        groups._SHARED_FROM_BYTES = 4096  # 16 tokens of a tiny model, so that both ways to the next stage are gone
        self.groups = groups.connect_groups(
            layout,
            rank,
            host="127.0.0.1",
            port=port,
            backend="gloo",
            timeout_seconds=TIMEOUT_SECONDS,
            device=torch.device("cpu"),
            listener=self.listener,
            shares_memory=config.cpu_kernels != "reference",
        )
        self.worker = Worker(config, model_config, self.groups)

    def load(self) -> None:
        self.worker.load()

    def kv_budget(self, block_size: int) -> tuple[int, int]:
        return self.worker.kv_block_bytes(block_size), self.worker.available_kv_bytes()

    def initialize(self, num_blocks: int, max_model_len: int) -> list[tuple[int, ...]]:
        self.worker.initialize_kv_cache(num_blocks, max_model_len)
        assert self.worker.runner is not None
        return [tuple(caches[0].shape) for caches in self.worker.runner.kv_caches]

    def execute(self, plan: StepPlan, update: Any) -> StepResult:
        return self.worker.execute(plan, update).result()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(worker, *args)`; a function of a module that can be imported here."""
        return function(self.worker, *args)

    def stop(self) -> None:
        self.worker.shutdown()
        self.groups.close()


class PooledExecutor:
    """See `Executor`; its ranks are processes of `pool`, used again when it is shut down."""

    def __init__(self, pool: RankPool, config: PagodaConfig, model_config: ModelConfig) -> None:
        self.pool = pool
        self.layout = ParallelLayout(
            config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel
        )
        self.max_concurrent_batches = config.pipeline_parallel_size
        self.kv_shapes: list[list[tuple[int, ...]]] = []
        self._config, self._model_config = config, model_config
        self._sampled_tokens = SampledTokensTracker()
        self._is_up = False

    def connect(self, stages: Any = None) -> None:
        """See `Executor`."""
        self.pool.send(0, "listen")
        port = self.pool.take(0)
        for rank in range(self.layout.world_size):
            self.pool.send(rank, "start", self._config, self._model_config, self.layout, port, rank)
        self._is_up = True
        for rank in range(self.layout.world_size):
            self.pool.take(rank)

    def load(self, progress: RankLoadListener | None = None) -> None:
        """See `Executor`."""
        self.call_all("load")

    def kv_budget(self, block_size: int) -> KVBudget:
        """See `Executor`."""
        budgets = self.call_all("kv_budget", block_size)
        return KVBudget(max(block for block, _ in budgets), min(available for _, available in budgets))

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """See `Executor`."""
        self.kv_shapes = self.call_all("initialize", num_blocks, max_model_len)

    def submit(self, plan: StepPlan) -> StepHandle:
        """See `Executor`."""
        update = self._sampled_tokens.update_for(plan)
        for rank in range(self.layout.world_size):
            self.pool.send(rank, "execute", plan, update)
        return _PooledStep(self)

    def take_result(self) -> StepResult:
        """The result of the oldest step; those of ranks that do not sample must be empty."""
        results = [self.pool.take(rank) for rank in range(self.layout.world_size)]
        for rank, result in enumerate(results):
            assert rank == self.layout.sampling_rank or not any(result.sampled_token_ids)
        result = results[self.layout.sampling_rank]
        if self.layout.pipeline_parallel_size > 1:
            self._sampled_tokens.record(result)
        return result

    def call_all(self, name: str, *args: Any) -> list[Any]:
        """Have all ranks of this layout do the same."""
        return self.pool.call_all(self.layout.world_size, name, *args)

    def check_health(self) -> None:
        """See `Executor`."""

    def ranks(self) -> list[Any]:
        """See `Executor`."""
        return []

    def shutdown(self) -> None:
        """See `Executor`."""
        if self._is_up:
            self._is_up = False
            self.call_all("stop")


class _PooledStep:
    def __init__(self, executor: PooledExecutor) -> None:
        self._executor = executor

    def result(self) -> StepResult:
        return self._executor.take_result()
