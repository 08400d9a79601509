"""The interface through which the engine runs steps on its ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from pagoda.adapters import LoraAdapter
from pagoda.execution.traced_kernel import Kernels
from pagoda.parallel.rank_health import RankHealth
from pagoda.scheduling.plan import StepPlan, StepResult

RankLoadListener = Callable[[str, int, int], None]
"""Called with a rank's name (empty: there is only one), bytes loaded and bytes in all, in the thread that loads."""


class StartupPhases(Protocol):
    """Reports the phases of the start-up."""

    def enter(self, name: str, detail: str = "") -> AbstractContextManager[None]:
        """A phase that lasts as long as the context; `detail` is for people."""

    def detail(self, text: str) -> None:
        """The progress within the present phase, for people."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Memory for KV blocks on the rank that has least of it: bytes of a block in the layers of that rank, and bytes for all.

    `note` says which rank that is, for people; empty when there is only one.
    """

    block_bytes: int
    available_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class AdapterOutcome:
    """Of `Executor.load_adapter`. `error`: why the adapter is not in its slot."""

    adapter: LoraAdapter
    error: str | None = None


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

    def connect(self, phases: StartupPhases) -> None:
        """Bring several ranks together, in phases `launch`, `rendezvous` and `communication`; a single rank has none.

        Raises a `PagodaError` that names the rank, its host and what to do.
        """

    def load(self, progress: RankLoadListener | None = None) -> None:
        """Set up the devices and load the weights. Raises `CheckpointError`."""

    def kv_budget(self, block_size: int) -> KVBudget:
        """Memory for KV blocks of `block_size` tokens, with the weights in place."""

    def initialize_kv_cache(self, num_blocks: int, max_model_len: int | None = None) -> None:
        """Allocate the KV cache, block 0 included, and run a first step. Nothing that grows is allocated after this.

        `max_model_len`: the longest sequence, where it was fitted to the KV cache; None: as configured, else the model's.
        """

    def release(self, level: int) -> None:
        """Free weights and KV cache, between two steps; `level` 2: the checkpoint's files in the page cache, too.

        No step is submitted before `load` and `initialize_kv_cache` were called again.
        """

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Does not raise for a failing step: its handle does."""

    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        """Begin to read an adapter for a slot, beside the steps. `take_loaded_adapters` says what came of it."""

    def unload_adapter(self, slot: int) -> None:
        """Empty the slot of an adapter that no request in a request slot has."""

    def take_loaded_adapters(self, timeout: float) -> list[AdapterOutcome]:
        """The adapters that are in their slots on all ranks, or failed, since the last call; without any, waits for
        `timeout` seconds."""

    def record_kernels(self) -> Kernels:
        """Record what torch runs on all ranks, from soon on until it is closed; it slows them down."""

    def check_health(self) -> None:
        """Raise `EngineDeadError` if no further step can run."""

    def ranks(self) -> list[RankHealth]:
        """The processes of the ranks; empty when there are none but the caller's."""

    def shutdown(self) -> None:
        """Free the resources of the ranks. May be called twice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed only because the device had no memory for it: a smaller one may fit."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class FailedStep:
    """The handle of a step that failed before it was under way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise self._error
