"""What torch runs in this process, recorded by its profiler: operations, and on a GPU the kernels that they launch.

The profiler can only be read after it has ended, so it ends and begins anew about once a second, between two steps. Its first
beginning takes seconds and is done beside the steps.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from pagoda.execution.traced_kernel import Kernels, TracedKernel

if TYPE_CHECKING:
    from torch.profiler import profile

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
MOST_KERNELS = 20_000
"""In a message; of more, the longest."""
_LEAST_NANOSECONDS = 2_000


class KernelRecorder(Kernels):
    """Records from soon after its making on, until `close`; at most `most` kernels a time, of more the longest."""

    def __init__(self, most: int = MOST_KERNELS, rank: int | None = None) -> None:
        self._most = most
        self._rank = rank
        self._profile: profile | None = None
        self._begun = 0.0
        self._is_over = False
        self._prepared = threading.Thread(target=_prepare, name="kernel-recorder", daemon=True)
        self._prepared.start()

    @override
    def take(self, now: float, *, is_idle: bool) -> tuple[list[TracedKernel], int]:
        """What was recorded, and how many more there were, when it is time for it; else nothing."""
        if self._prepared.is_alive() or self._is_over:
            return [], 0
        if self._profile is None:
            self._begin()
            return [], 0
        if now - self._begun < EVERY_SECONDS and not is_idle:
            return [], 0
        found = self._end()
        self._begin()
        return found

    @override
    def close(self) -> None:
        """Record no longer."""
        self._is_over = True
        if self._profile is not None:
            self._end()

    def _begin(self) -> None:
        self._profile = _make_profile()
        self._profile.start()
        self._begun = time.monotonic()

    def _end(self) -> tuple[list[TracedKernel], int]:
        from torch._C._autograd import DeviceType

        assert self._profile is not None
        finished, self._profile = self._profile, None
        finished.stop()
        results = finished.profiler.kineto_results if finished.profiler is not None else None
        if results is None:
            return [], 0
        offset = time.time_ns() - time.monotonic_ns()
        events = [event for event in results.events() if event.duration_ns() >= _LEAST_NANOSECONDS]
        num_lost = max(0, len(events) - self._most)
        if num_lost:
            events = sorted(events, key=lambda event: event.duration_ns(), reverse=True)[: self._most]
        kernels = []
        for event in events:
            on_device = event.device_type() != DeviceType.CPU
            kernels.append(
                TracedKernel(
                    event.name(),
                    (event.start_ns() - offset) / 1e9,
                    event.duration_ns() / 1e9,
                    event.device_resource_id() if on_device else event.start_thread_id(),
                    on_device,
                    self._rank,
                )
            )
        return kernels, num_lost


def _make_profile() -> profile:
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))


def _prepare() -> None:
    """Import the profiler, and have it set itself up."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes a line to stderr whenever it begins and ends
    first = _make_profile()
    first.start()
    first.stop()
    logger.info("kernels are recorded")
