"""Operations of torch within steps, as a viewer asks for them."""

from __future__ import annotations

import threading
import time

import torch

from pagoda.execution.kernel_recorder import KernelRecorder
from tests.support.waiting import wait_until


def test_what_runs_is_recorded_with_its_times_and_thread() -> None:
    recorder = KernelRecorder()
    try:
        assert recorder.take(time.monotonic(), is_idle=True) == ([], 0)  # it is being prepared beside the steps
        wait_until(lambda: not recorder._prepared.is_alive())
        assert recorder.take(time.monotonic(), is_idle=True) == ([], 0)  # from now on
        left = torch.ones(300, 300)
        begun = time.monotonic()
        left @ left
        other = threading.Thread(target=lambda: left.exp())
        other.start()
        other.join()
        ended = time.monotonic()
        assert recorder.take(time.monotonic(), is_idle=False) == ([], 0)  # not yet a second
        kernels, num_lost = recorder.take(time.monotonic(), is_idle=True)
        assert num_lost == 0
        found = {kernel.name: kernel for kernel in kernels}
        assert begun - 0.05 <= found["aten::mm"].started <= ended + 0.05
        assert 0 < found["aten::mm"].seconds <= ended - begun
        assert found["aten::exp"].thread != found["aten::mm"].thread
        assert not found["aten::mm"].on_device
    finally:
        recorder.close()
    assert recorder.take(time.monotonic(), is_idle=True) == ([], 0)
