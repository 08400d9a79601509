"""The launch of a core's process, before its configuration is known.

`import torch` is the longest part of a start. So `pagoda serve` launches the core first, and reads its own
settings and libraries meanwhile. This file imports little, for the same reason.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

from pagoda.engine.heartbeat import SharedHeartbeat
from pagoda.process_control import environment_without_keys


class PrelaunchedProcess:
    """A core's process that waits for its configuration. As a context, it ends the process that was not taken.

    They talk over a socket pair that the child inherits: no other process can connect to it, and when either
    side exits the other reads the disconnect at once.
    """

    def __init__(self, *, niceness: int = 0) -> None:
        """Launch; `niceness`: see nice(2), of its imports. Raises `OSError` where there can be no process."""
        self.socket, theirs = socket.socketpair()
        self.heartbeat = SharedHeartbeat()
        self._is_taken = False
        try:
            with theirs:
                arguments = (theirs.fileno(), self.heartbeat.fd, niceness)
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "pagoda.engine.core.process", *map(str, arguments)],
                    pass_fds=(theirs.fileno(), self.heartbeat.fd),
                    env=environment_without_keys(),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:  # raised on: what was opened for the process must be closed
            self._close()
            raise

    def take(self) -> Self:
        """Transfer ownership of the process, its socket and its shared heartbeat to the caller."""
        self._is_taken = True
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, unless it was taken."""
        if not self._is_taken:
            self._is_taken = True
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        self.socket.close()
        self.heartbeat.close()
