"""What Ray's processes on this machine listen on, and who can reach it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

CLIENT_SERVER_PORT = 10001

_NAMES = ("gcs_server", "raylet")
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class OpenPort:
    """A port that a process of Ray listens on. `address`: as it is bound."""

    process: str
    address: str
    port: int

    def is_beyond(self, address: str) -> bool:
        """Whether more than the interface of `address` and this machine reach it."""
        return self.address not in (address, f"::ffff:{address}", "127.0.0.1", "::1")

    def __str__(self) -> str:
        return f"{self.process} {'*' if self.address in _EVERYWHERE else self.address}:{self.port}"


def open_ports() -> list[OpenPort]:
    """Those of this user's Ray processes, by port."""
    return sorted(_open_ports(), key=lambda port: port.port)


def describe_open_ports(address: str, logger: logging.Logger) -> None:
    """Log what Ray listens on; what is open beyond the interface of `address` as a warning."""
    ports = open_ports()
    beyond = [port for port in ports if port.is_beyond(address)]
    logger.info("Ray listens on %s", ", ".join(map(str, ports)) or "nothing that this process can see")
    if beyond:
        logger.warning(
            "Ray listens on all interfaces, not on %s alone, with %s: only the token keeps others out",
            address,
            ", ".join(map(str, beyond)),
        )


def _open_ports() -> Iterator[OpenPort]:
    for process in psutil.process_iter(["name"]):
        name = process.info["name"] or ""
        if name not in _NAMES and not name.startswith("ray::"):
            continue
        # Where Ray was imported first, psutil is its own older copy.
        list_connections = getattr(process, "net_connections", None) or process.connections
        try:
            connections = list_connections(kind="tcp")
        except psutil.Error:
            continue  # it has ended, or is another user's
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                yield OpenPort(name, connection.laddr.ip, connection.laddr.port)
