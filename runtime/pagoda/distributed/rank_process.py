"""A rank in a process of its own on the driver's machine: `python -m pagoda.distributed.rank_process SOCKET_FD RANK`."""

from __future__ import annotations

import socket
import sys

from pagoda.platform.hardware import may_have_gpu
from pagoda.platform.torch_import import defer_meta_kernels
from pagoda.process_control import become_child, uncollected


def main(socket_fd: int, rank: int) -> int:
    """Serve the driver at the other end of the inherited socket; the exit status."""
    become_child()
    if not may_have_gpu():
        defer_meta_kernels()
    # Not before: whatever happens while torch is imported, the kernel ends this process with its parent.
    with uncollected():
        from pagoda.distributed.rank_service import RankService

    return RankService(socket.socket(fileno=socket_fd), rank).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
