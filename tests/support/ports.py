"""Ports for what cannot take port 0 itself."""

from __future__ import annotations

import os
import socket

# Below what the kernel gives to those who ask for any port, so that none of them takes it meanwhile.
FIRST, COUNT = 20_000, 1_000
_next = 0


def free_port() -> int:
    """A port of loopback that nothing listens on. Workers of a parallel run have ranges of their own; no port comes twice."""
    global _next
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(COUNT):
        port = FIRST + worker * COUNT + _next % COUNT
        _next += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"all ports from {FIRST + worker * COUNT} on are taken")
