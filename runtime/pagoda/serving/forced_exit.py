"""No lingering: a server that has decided to end is gone within a bound, whatever holds it up.

An orderly end waits for threads and child processes. One that hangs, such as a download in a thread that nothing can stop,
would keep a process alive that serves nobody.
"""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)

ORDERLY_END_SECONDS = 20.0


def arm(status: int, seconds: float = ORDERLY_END_SECONDS) -> None:
    """End the process with `status` in `seconds` if it has not ended by then."""

    def end() -> None:
        logger.error("the server did not end in order within %g s: it is ended now", seconds)
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
