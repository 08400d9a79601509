"""A rank as Ray runs it: an actor that connects back to the driver and then serves it like any other rank.

Kept apart, and light, because the module is imported on the worker's side by its name: nothing of it is pickled.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

CONNECT_SECONDS = 30.0


class PagodaRank:
    """The actor. Its process holds the model's share from `serve` on, and Ray ends it with the driver's."""

    def serve(self, rank: int, address: str, port: int, secret: bytes) -> int:
        """Serve the driver that listens at `address`:`port`; the exit status of the rank."""
        from pagoda.distributed.ray.listener import connect_to_driver

        connected = connect_to_driver(
            address, port, rank=rank, host=socket.gethostname(), secret=secret, timeout_seconds=CONNECT_SECONDS
        )
        # Not before: the driver should know of this rank while torch is imported.
        from pagoda.distributed.node_state import DIRECTORY_VARIABLE
        from pagoda.distributed.rank_service import RankService

        directory = os.environ.get(DIRECTORY_VARIABLE)
        return RankService(connected, rank, Path(directory) if directory else None).run()
