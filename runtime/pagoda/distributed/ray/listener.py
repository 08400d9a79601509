"""How ranks on other machines come back to the driver: over TCP, with a mutual HMAC handshake.

    driver                                       rank
    listens  ◀──────────── connects ───────────────
    challenge (32 random bytes)  ──────────────────▶
             ◀── challenge, rank, host, HMAC(secret, both challenges, "rank", rank, host)
    HMAC(secret, both challenges, "driver", rank) ─▶
                 frames of `rank_messages`

A new secret is made for every launch and reaches the ranks through Ray. A peer that fails the handshake is disconnected and
logged; nothing that it sends is interpreted. What follows is authenticated by the connection and not encrypted, as the traffic
of the model itself: the network between the ranks must be a trusted one.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pagoda.errors import CommunicationError
from pagoda.parallel.interfaces import listen_on

logger = logging.getLogger(__name__)

SECRET_BYTES = 32

_HANDSHAKE_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_MAX_HANDSHAKES = 64
_MAX_HOST_BYTES = 255
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_CHALLENGE_BYTES = 32
_ANSWER = struct.Struct(f"!{_CHALLENGE_BYTES}sIB")


@dataclass(frozen=True, slots=True)
class ConnectedRank:
    """A rank that passed the handshake: its connection, and its host's name and address."""

    socket: socket.socket
    host: str
    address: str


class RankListener:
    """Listens on one address of the driver until all ranks are there. A context, which closes the port at its end."""

    def __init__(self, address: str, num_ranks: int) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._num_ranks = num_ranks
        self._ranks: dict[int, ConnectedRank] = {}
        self._lock = threading.Lock()
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._is_open = True
        self._listener = listen_on(address)
        self._listener.settimeout(_LOOK_SECONDS)
        self.address = address
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> RankListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        with self._lock:
            self._is_open = False
            if kind is not None:
                for connected in self._ranks.values():
                    connected.socket.close()

    @property
    def missing(self) -> list[int]:
        """Ranks that are not there yet."""
        with self._lock:
            return [rank for rank in range(self._num_ranks) if rank not in self._ranks]

    def accept_all(self, deadline: float, on_look: Callable[[list[int]], None]) -> list[ConnectedRank]:
        """Wait for all ranks, until `deadline` (`time.monotonic()`); in the order of ranks.

        `on_look` is called a few times a second with the missing ranks; what it raises ends the wait.

        Raises:
            CommunicationError: some ranks did not come in time.
        """
        while missing := self.missing:
            on_look(missing)
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing))
                raise CommunicationError(
                    f"rank{'s' if len(missing) > 1 else ''} {ranks} did not connect to {self.address}:{self.port} in time: "
                    "see whether that address can be reached from their nodes, or set network_interface"
                )
            try:
                connected, peer = self._listener.accept()
            except TimeoutError:
                continue
            if self._handshakes.acquire(blocking=False):
                threading.Thread(target=self._handshake, args=(connected, peer[0]), daemon=True).start()
            else:
                connected.close()
        with self._lock:
            return [self._ranks[rank] for rank in range(self._num_ranks)]

    def _handshake(self, connected: socket.socket, peer: str) -> None:
        try:
            rank, connected_rank = self._challenge(connected, peer)
            with self._lock:
                if not self._is_open or rank in self._ranks:
                    raise PermissionError(f"rank {rank} is connected already, or too late")
                self._ranks[rank] = connected_rank
        except (OSError, ValueError, EOFError) as error:
            logger.warning("a connection from %s was refused: %s", peer, error or type(error).__name__)
            connected.close()
        finally:
            self._handshakes.release()

    def _challenge(self, connected: socket.socket, peer: str) -> tuple[int, ConnectedRank]:
        deadline = time.monotonic() + _HANDSHAKE_SECONDS
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        connected.settimeout(_HANDSHAKE_SECONDS)
        connected.sendall(challenge)
        their_challenge, rank, length = _ANSWER.unpack(_receive(connected, _ANSWER.size, deadline))
        host = _receive(connected, length, deadline)
        proof = _receive(connected, _DIGEST_BYTES, deadline)
        both = challenge + their_challenge
        if not hmac.compare_digest(proof, _proof(self.secret, both, b"rank", rank, host)):
            raise PermissionError("handshake failed: wrong secret")
        if rank >= self._num_ranks:
            raise ValueError(f"there is no rank {rank}")
        connected.sendall(_proof(self.secret, both, b"driver", rank))
        connected.settimeout(None)
        return rank, ConnectedRank(connected, host.decode(errors="replace"), peer)


def connect_to_driver(
    address: str, port: int, *, rank: int, host: str, secret: bytes, timeout_seconds: float
) -> socket.socket:
    """Connect to the driver as `rank` on `host` with the handshake from its side.

    Raises:
        CommunicationError: no connection within `timeout_seconds`, or a failed handshake.
    """
    what = f"rank {rank} on {host} cannot reach the engine at {address}:{port}"
    deadline = time.monotonic() + timeout_seconds
    try:
        connected = socket.create_connection((address, port), timeout_seconds)
    except OSError as error:
        raise CommunicationError(f"{what}: {error.strerror or error}; set network_interface") from error
    try:
        challenge = _receive(connected, _CHALLENGE_BYTES, deadline)
        ours = secrets.token_bytes(_CHALLENGE_BYTES)
        name = host.encode()[:_MAX_HOST_BYTES]
        both = challenge + ours
        connected.sendall(_ANSWER.pack(ours, rank, len(name)) + name + _proof(secret, both, b"rank", rank, name))
        if not hmac.compare_digest(_receive(connected, _DIGEST_BYTES, deadline), _proof(secret, both, b"driver", rank)):
            raise PermissionError("handshake failed: not the engine that launched this rank")
    except (OSError, EOFError) as error:
        connected.close()
        raise CommunicationError(f"{what}: {error or 'the connection was closed'}") from error
    connected.settimeout(None)
    return connected


def _proof(secret: bytes, challenges: bytes, role: bytes, rank: int, host: bytes = b"") -> bytes:
    return hmac.digest(secret, b"|".join([role, challenges, str(rank).encode(), host]), _DIGEST)


def _receive(connected: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly `size` bytes. Raises `TimeoutError` past the deadline however slowly they trickle in, `EOFError` at the end."""
    received = bytearray()
    while len(received) < size:
        connected.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connected.recv(size - len(received))
        if not piece:
            raise EOFError("the connection was closed")
        received += piece
    return bytes(received)
