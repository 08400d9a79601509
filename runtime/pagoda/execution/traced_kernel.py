"""What a viewer sees of a rank's steps from within; see `kernel_recorder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TracedKernel:
    """An operation of torch, or a kernel on a GPU (`on_device`). `started`: monotonic seconds; `thread`: a number for each.

    `rank`: which one ran it; None: the engine core's process has the only one.
    """

    name: str
    started: float
    seconds: float
    thread: int
    on_device: bool = False
    rank: int | None = None


class Kernels(Protocol):
    """Records what runs within steps, from its making on."""

    def take(self, now: float, *, is_idle: bool) -> tuple[list[TracedKernel], int]:
        """What was recorded, and how many more there were, when it is time for it; else nothing."""

    def close(self) -> None:
        """Record no longer."""
