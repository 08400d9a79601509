"""A stand-in for CUDA's graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagoda.execution.worker import Worker


class Recording:
    """Repeats captured steps over the same memory, and counts."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.num_captured += 1
        hidden = step().clone()

        def replay() -> None:
            self.num_replayed += 1
            with torch.inference_mode():
                hidden.copy_(step())

        return replay, hidden


_RECORDINGS: dict[int, Recording] = {}


def record_decode_steps(worker: Worker) -> None:
    """Let the decode steps of a worker run as recordings, as those of a GPU run as graphs."""
    assert worker.runner is not None
    recording = _RECORDINGS[id(worker)] = Recording()
    worker.runner.capture_graphs(recording)


def num_replayed(worker: Worker) -> int:
    """How often a worker's recordings were replayed."""
    return _RECORDINGS[id(worker)].num_replayed
