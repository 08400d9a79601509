"""The core's heartbeat: one page of shared memory that the core writes and the API process reads.

Reading it needs no response from the core, so a probe can tell a busy core from a stuck or stopped one.
Each field is 8 aligned bytes, written by one process and read by another; a read may mix the fields of two consecutive
updates, which is harmless.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

_LAYOUT = struct.Struct("=QQQQ")


@dataclass(frozen=True, slots=True)
class EngineHeartbeat:
    """The core's last heartbeat: number of steps done, its `time` (monotonic seconds), and the `scheduled_tokens` in flight
    since then; 0 when the core is idle.
    """

    step: int
    time: float
    scheduled_tokens: int
    is_busy: bool

    @property
    def is_up(self) -> bool:
        """Whether there was a heartbeat; the first comes when the core has started."""
        return self.time > 0


class SharedHeartbeat:
    """The page. The parent creates it, the child opens the inherited file descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("pagoda-heartbeat", 0)
            os.ftruncate(fd, mmap.PAGESIZE)
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    def write(self, step: int, scheduled_tokens: int, *, is_busy: bool) -> None:
        """Write a heartbeat with the current time."""
        _LAYOUT.pack_into(self._page, 0, step, time.monotonic_ns(), scheduled_tokens, is_busy)

    def read(self) -> EngineHeartbeat:
        """The last heartbeat; all zero before the first."""
        step, nanoseconds, tokens, is_busy = _LAYOUT.unpack_from(self._page, 0)
        return EngineHeartbeat(step, nanoseconds / 1e9, tokens, bool(is_busy))

    def close(self) -> None:
        """Unmap the page and close the descriptor."""
        self._page.close()
        os.close(self.fd)
