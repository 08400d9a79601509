"""What torch runs on ranks in processes of their own, for a viewer of the engine core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from typing_extensions import override

from pagoda.distributed.rank_messages import KernelsRecorded, RecordKernels
from pagoda.execution.kernel_recorder import MOST_KERNELS
from pagoda.execution.traced_kernel import Kernels, TracedKernel


class RankKernels(Kernels):
    """Has all ranks record until `close`. `tell`: sends them a command."""

    def __init__(self, tell: Callable[[RecordKernels], None], num_ranks: int) -> None:
        self._tell = tell
        self._kernels: list[TracedKernel] = []
        self._num_lost = 0
        self._is_over = False
        tell(RecordKernels(max(1, MOST_KERNELS // num_ranks)))

    def add(self, recorded: KernelsRecorded) -> None:
        """Take what a rank has sent. Its clock becomes this process's: both hosts agree on the time of day."""
        if self._is_over:
            return
        shift = recorded.epoch - (time.time() - time.monotonic())
        self._kernels += [replace(one, started=one.started + shift) for one in recorded.kernels]
        self._num_lost += recorded.num_lost

    @override
    def take(self, now: float, *, is_idle: bool) -> tuple[list[TracedKernel], int]:
        kernels, self._kernels = self._kernels, []
        num_lost, self._num_lost = self._num_lost, 0
        return kernels, num_lost

    @override
    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._kernels.clear()
            self._tell(RecordKernels(0))
