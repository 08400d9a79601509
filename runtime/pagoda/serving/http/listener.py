"""The sockets of the ports; that of REST is taken before anything heavy is imported."""

from __future__ import annotations

import resource
import socket

from pagoda.errors import ConfigError

BACKLOG = 2048
MAX_OPEN_FILES = 2**16


def listen(host: str, port: int, setting: str) -> socket.socket:
    """The socket of a port, listening: clients that come while the server is loaded wait in its backlog.

    Raises `ConfigError`, which names the `setting`, for an address or port that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        is_any_ipv6 = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_any_ipv6)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}; check host, {setting}: {error.strerror or error}"
        ) from error


def raise_open_file_limit() -> None:
    """Let this process have as many connections as it may: the usual soft limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
