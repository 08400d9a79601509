"""A stand-in for CUDA's graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
