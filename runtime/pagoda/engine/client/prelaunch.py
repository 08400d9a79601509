"""The launch of a core's process, before anything is known but that there will be one.

The core imports torch for longer than anything else takes at a start. So `pagoda serve` launches it first, and reads its own
settings and libraries meanwhile. This file imports little, for the same reason.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

from pagoda.engine.heartbeat import SharedHeartbeat


class PrelaunchedProcess:
    """A core's process that waits for its configuration. As a context, it ends the process that nobody took over.

    They talk over a socket pair that the child inherits: nobody else can connect to it, and when either side dies the other
    reads its end at once.
    """

    def __init__(self) -> None:
        """Launch. Raises `OSError` where there can be no process."""
        self.socket, theirs = socket.socketpair()
        self.heartbeat = SharedHeartbeat()
        self._is_taken = False
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "pagoda.engine.core.process", str(theirs.fileno()), str(self.heartbeat.fd)],
                    pass_fds=(theirs.fileno(), self.heartbeat.fd),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:  # raised on: nobody else could close what was opened for the process
            self._close()
            raise

    def take(self) -> Self:
        """Have the process, its socket and its heartbeat, and end them oneself."""
        self._is_taken = True
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_taken:
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        self.socket.close()
        self.heartbeat.close()
