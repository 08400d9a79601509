"""The engine core's process: `python -m pagoda.engine.core.process SOCKET_FD HEARTBEAT_FD NICENESS`.

`PrelaunchedProcess` makes it. It imports little, and then what is most of a start, torch. Beside engines that serve that
is done at a lower priority, in a thread of its own, for without privileges a process never raises its own again.
"""

from __future__ import annotations

import sys

from pagoda.platform.hardware import may_have_gpu
from pagoda.platform.torch_import import defer_meta_kernels
from pagoda.process_control import become_child, uncollected, with_lower_priority


def main(socket_fd: int, heartbeat_fd: int, niceness: int) -> int:
    """Run the core until its parent ends it; returns the exit code."""
    become_child()
    failure = with_lower_priority(_import_engine, niceness)
    from pagoda.engine.core.service import serve

    return serve(socket_fd, heartbeat_fd, failure)


def _import_engine() -> Exception | None:
    """Import torch and what needs it, while the parent still reads its settings; returns the error, for the parent."""
    import pagoda.engine.core.service  # what tells the parent of an error

    try:
        if not may_have_gpu():
            defer_meta_kernels()
        with uncollected():
            import pagoda.engine.core.startup  # noqa: F401 (here for the time that it takes)
    except Exception as error:  # a broken installation can fail in any way
        return error
    return None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
