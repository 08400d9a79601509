"""The connections of a port: how many there may be, in all and of one peer, who makes room, and whose time is up.

A connection that waits for a request (idle, in the TLS handshake, or in the middle of a head) holds no work. Where there are
as many connections as allowed, the one that waits longest is closed for a new one, as nginx does; so connections that send
nothing keep no client and no probe out. One that has a request under way is never closed for another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from email.utils import formatdate
from ipaddress import IPv6Address
from typing import Protocol

from pagoda.config.schema import PagodaConfig

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 2**20
"""What the unfinished heads of all connections may take together."""
SLOWEST_BODY_BYTES_PER_SECOND = 1024
LONGEST_CHECK_SECONDS = 1.0
CHECKS_PER_TIMEOUT = 4
REPORT_EVERY_SECONDS = 10.0


class Connection(Protocol):
    """What the registry asks of a connection."""

    def evict(self) -> None:
        """Close at once: another needs the place."""

    def check(self, now: float) -> None:
        """Close what has waited too long; `now` is the event loop's time."""

    def end(self) -> None:
        """Close as soon as the response under way, if any, is complete."""

    def abort(self) -> None:
        """Cut the connection."""


class PortConnection(asyncio.Protocol, ABC):
    """A connection from `client`, an address and port, as its port opens it.

    `opening` is the task that does, TLS handshake included.
    """

    def __init__(self, client: tuple[str, int]) -> None:
        self.client = client
        self.opening: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        """The client, for logs."""
        return f"{self.client[0]}:{self.client[1]}"

    def evict(self) -> None:
        """Close at once: another needs the place."""
        if self.opening is not None:
            self.opening.cancel()
        self.abort()

    @abstractmethod
    def check(self, now: float) -> None:
        """Close what has waited too long; `now` is the event loop's time."""

    @abstractmethod
    def end(self) -> None:
        """Close as soon as what is under way is complete."""

    @abstractmethod
    def abort(self) -> None:
        """Cut the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Bounds of one connection: bytes, headers, seconds."""

    max_header_bytes: int
    max_header_count: int
    keep_alive_timeout: float
    header_timeout: float
    body_timeout: float
    send_timeout: float

    @classmethod
    def from_config(cls, config: PagodaConfig) -> HttpLimits:
        """Those of the settings."""
        return cls(
            max_header_bytes=config.max_header_bytes,
            max_header_count=config.max_header_count,
            keep_alive_timeout=config.keep_alive_timeout_seconds,
            header_timeout=config.header_timeout_seconds,
            body_timeout=config.body_timeout_seconds,
            send_timeout=config.send_timeout_seconds,
        )

    @property
    def check_seconds(self) -> float:
        """Time between two looks at a connection's deadlines."""
        shortest = min(self.keep_alive_timeout, self.header_timeout, self.body_timeout, self.send_timeout)
        return min(LONGEST_CHECK_SECONDS, shortest / CHECKS_PER_TIMEOUT)


@dataclass(slots=True)
class Peer:
    """A client's address, and its connections; those that wait for a request in the order in which they began to."""

    name: str
    num_connections: int = 0
    waiting: dict[Connection, None] = field(default_factory=dict)


class Connections:
    """All connections of the port."""

    def __init__(self, limits: HttpLimits, max_connections: int, max_connections_per_peer: int) -> None:
        self.limits = limits
        self.is_closing_soon = False
        """Whether responses close their connections, as they do while the server drains."""
        self.date_header = b""
        self.tasks: set[asyncio.Task[None]] = set()
        """Applications that make responses."""
        self._max_connections = max_connections
        self._max_connections_per_peer = max_connections_per_peer
        self._peers: dict[str, Peer] = {}
        self._connections: dict[Connection, Peer] = {}
        self._waiting: dict[Connection, None] = {}
        self._heads: dict[
            Connection, int
        ] = {}  # bytes of their unfinished heads, the one that was begun first in front
        self._num_head_bytes = 0
        self._reported = float("-inf")

    def __len__(self) -> int:
        return len(self._connections)

    def admit(self, connection: Connection, address: str) -> bool:
        """Count a new connection from `address`, which waits for its first request; False where there is no place for it."""
        name = _peer_name(address)
        peer = self._peers.setdefault(name, Peer(name))
        is_peer_full = peer.num_connections >= self._max_connections_per_peer
        if is_peer_full or len(self._connections) >= self._max_connections:
            evicted = next(iter(peer.waiting if is_peer_full else self._waiting), None)
            self._report(name if is_peer_full else None, is_refused=evicted is None)
            if evicted is None:
                if not peer.num_connections:
                    del self._peers[name]
                return False
            self.remove(evicted)
            evicted.evict()
            self._peers[name] = peer
        peer.num_connections += 1
        self._connections[connection] = peer
        self.is_waiting(connection)
        return True

    def is_waiting(self, connection: Connection) -> None:
        """The connection waits for a request."""
        self.drop_head(connection)
        peer = self._connections.get(connection)
        if peer is not None:
            self._waiting[connection] = peer.waiting[connection] = None

    def holds_head(self, connection: Connection, num_bytes: int) -> None:
        """The connection has so many bytes of a head; the oldest heads make room where all together are too many."""
        self._num_head_bytes += num_bytes - self._heads.get(connection, 0)
        self._heads[connection] = num_bytes
        while self._num_head_bytes > MAX_HEAD_BYTES:
            oldest = next(iter(self._heads))
            self.remove(oldest)
            oldest.evict()

    def drop_head(self, connection: Connection) -> None:
        """The head is complete, or its connection gone."""
        self._num_head_bytes -= self._heads.pop(connection, 0)

    def is_busy(self, connection: Connection) -> None:
        """The connection has a request under way."""
        self.drop_head(connection)
        if self._waiting.pop(connection, connection) is None:
            del self._connections[connection].waiting[connection]

    def remove(self, connection: Connection) -> None:
        """The connection is closed, or will be in a moment; may be called twice."""
        peer = self._connections.pop(connection, None)
        if peer is None:
            return
        self.drop_head(connection)
        self._waiting.pop(connection, None)
        peer.waiting.pop(connection, None)
        peer.num_connections -= 1
        if not peer.num_connections:
            del self._peers[peer.name]

    def end_all(self) -> None:
        """End every connection."""
        for connection in list(self._connections):
            connection.end()

    def abort_all(self) -> None:
        """Cut those that are left."""
        for connection in list(self._connections):
            connection.abort()

    async def watch(self) -> None:
        """Keep deadlines, and the date in responses; runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self.date_header = b"date: %b\r\n" % formatdate(time.time(), usegmt=True).encode()
            now = loop.time()
            for connection in list(self._connections):
                connection.check(now)
            await asyncio.sleep(self.limits.check_seconds)

    def _report(self, peer: str | None, *, is_refused: bool) -> None:
        """Say that the limit was met, not more often than every few seconds."""
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY_SECONDS:
            return
        self._reported = now
        what = "a new one is refused" if is_refused else "one that waited for a request is closed for a new one"
        if peer is None:
            logger.warning("all %d connections are taken (max_connections): %s", self._max_connections, what)
        else:
            limit = self._max_connections_per_peer
            logger.warning("%s has all %d connections of a peer (max_connections_per_peer): %s", peer, limit, what)


def _peer_name(address: str) -> str:
    """The address, or of an IPv6 one its /64: a client has as many addresses in it as it likes."""
    if ":" not in address:
        return address
    parsed = IPv6Address(address.partition("%")[0])
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Address(int(parsed) >> 64 << 64)) + "/64"
