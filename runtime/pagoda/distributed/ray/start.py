"""`ray start` without the Ray client server: `python -m pagoda.distributed.ray.start start …`.

That server (port 10001) runs the code of every client that connects to it, and Pagoda is no such client. Ray starts it
wherever grpc can be imported and has no option for leaving it out; as in an installation without grpc, it is left out here.
"""

from __future__ import annotations

import sys


def run() -> int:
    """Ray's own command line; its exit status."""
    sys.modules["grpc"] = None  # type: ignore[assignment]
    from ray.scripts.scripts import main

    return int(main() or 0)


if __name__ == "__main__":
    sys.exit(run())
