"""Unknown keys are answered slowly, so that nobody tries many. Who sends a known key is never looked up here.

Each peer, and all of them together, has a schedule of answers, as in GCRA (ITU-T I.371): a burst at once, then one every
interval. What would wait longer than `MAX_DELAY_SECONDS` is refused instead of held, so what waits is bounded by
`MAX_DELAY_SECONDS / interval` answers, whoever sends. Peers beyond `MAX_PEERS` are forgotten, the oldest first.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

from pagoda.errors import QueueFullError

PEER_BURST = 5
PEER_INTERVAL_SECONDS = 1.0
TOTAL_BURST = 100
TOTAL_INTERVAL_SECONDS = 0.05
MAX_DELAY_SECONDS = 5.0
MAX_PEERS = 4096


class TooManyAttemptsError(QueueFullError):
    """Too many unknown keys came from this peer, or from all of them."""


class FailedAttempts:
    """The schedules. `clock`: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: OrderedDict[str, float] = OrderedDict()  # when the next answer would be due, without a burst
        self._total = 0.0

    def delay(self, peer: str) -> float:
        """Note an unknown key from `peer`; for how many seconds its answer must wait.

        Raises `TooManyAttemptsError` where that is longer than `MAX_DELAY_SECONDS`; nothing is noted then.
        """
        now = self._clock()
        network = network_of(peer)
        own, total = max(self._peers.get(network, 0.0), now), max(self._total, now)
        wait = max(
            own - now - (PEER_BURST - 1) * PEER_INTERVAL_SECONDS,
            total - now - (TOTAL_BURST - 1) * TOTAL_INTERVAL_SECONDS,
            0.0,
        )
        if wait > MAX_DELAY_SECONDS:
            raise TooManyAttemptsError(
                "too many requests with unknown API keys; those with a known key are not affected",
                retry_after_seconds=ceil(wait),
            )
        self._peers[network] = own + PEER_INTERVAL_SECONDS
        self._peers.move_to_end(network)
        self._total = total + TOTAL_INTERVAL_SECONDS
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return wait


def network_of(peer: str) -> str:
    """Whom an address stands for: itself, or the /64 of an IPv6 address, of which one host may use every one."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return peer
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
