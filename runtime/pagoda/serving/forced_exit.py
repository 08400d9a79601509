"""A bound on shutdown: the process exits even where an orderly shutdown hangs.

Shutdown waits for threads and child processes. One that blocks, such as a download in a thread that cannot be cancelled,
would keep a process alive that no longer serves.
"""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)


def force_exit_after(seconds: float, status: int) -> None:
    """Exit with `status` if the process is still there in `seconds`; does not wait."""

    def force_exit() -> None:
        logger.error("shutdown did not complete within %g s: forcing exit", seconds)
        os._exit(status)

    timer = threading.Timer(seconds, force_exit)
    timer.daemon = True
    timer.start()
