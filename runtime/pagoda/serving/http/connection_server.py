"""Accepts the connections of a port within bounds, keeps their deadlines, and ends them in order."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from abc import ABC, abstractmethod
from functools import partial

from pagoda.config.schema import PagodaConfig
from pagoda.serving.certificates import CertificateFiles
from pagoda.serving.http.connections import Connections, HttpLimits, PortConnection
from pagoda.serving.http.disconnect import end_tasks

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5
CONNECTION_DRAIN_SECONDS = 1.0
RESERVED_FILES = 256
"""Open files that are kept for other things than the connections of the two ports."""

ACCEPTED_AT_ONCE = 64

_POLL_SECONDS = 0.02
_NO_FILE_LEFT_SECONDS = 0.1


class ConnectionServer(ABC):
    """Serves connections of `make_connection` from `serve` until `close`."""

    protocol: str
    """In logs."""
    alpn: str
    close_seconds: float = CLOSE_SECONDS

    def __init__(self, config: PagodaConfig) -> None:
        self._config = config
        max_connections = _max_connections(config)
        per_peer = config.max_connections_per_peer or max(1, max_connections // 2)
        self._limits = HttpLimits.from_config(config)
        self._connections = Connections(self._limits, max_connections, per_peer)
        self._closing = asyncio.Event()

    @abstractmethod
    def make_connection(self, address: tuple[str, int]) -> PortConnection:
        """The protocol of a connection from a client's address and port."""

    @abstractmethod
    def refusal(self) -> bytes:
        """What a connection is sent, without TLS, for which there is no place."""

    def tls_context(self) -> ssl.SSLContext | None:
        """That of the certificate in the settings. Raises `ConfigError` for one that cannot be used."""
        certificate = CertificateFiles.from_config(self._config)
        if certificate is None:
            return None
        certificate.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.certfile, certificate.keyfile)
        context.set_alpn_protocols([self.alpn])
        return context

    async def serve(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        """Serve on `listener`, with the `tls_context`, until `close`."""
        endless = [asyncio.ensure_future(self._connections.watch())]
        certificate = CertificateFiles.from_config(self._config)
        if certificate is not None and context is not None:
            load = partial(context.load_cert_chain, certificate.certfile, certificate.keyfile)
            endless.append(asyncio.ensure_future(certificate.reload_when_renewed(load, self.protocol)))
        closing = asyncio.ensure_future(self._closing.wait())
        listener.setblocking(False)
        self._listen(listener, context)
        try:
            await asyncio.wait((*endless, closing), return_when=asyncio.FIRST_COMPLETED)
            for task in endless:
                if task.done():
                    task.result()  # raises
        finally:
            self._closing.set()
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
            await self._end_connections()
            await end_tasks(closing, *endless)

    def close(self) -> None:
        """Stop listening; `serve` returns when running responses are sent, or after `close_seconds`."""
        self._closing.set()

    def _listen(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        """Accept connections as they come, until the server closes."""
        if not self._closing.is_set():
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, context)

    def _accept(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no file or no memory left for it: it stays in the backlog
                logger.warning("cannot accept a connection: %s", error.strerror or error)
                loop.remove_reader(listener)
                loop.call_later(_NO_FILE_LEFT_SECONDS, self._listen, listener, context)
                return
            connection = self.make_connection((address[0], address[1]))
            if self._connections.admit(connection, address[0]):
                connection.opening = loop.create_task(self._open(connection, accepted, context))
            else:
                self._turn_away(accepted, context)

    async def _open(self, connection: PortConnection, accepted: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._limits.header_timeout,
            )
        except (OSError, asyncio.CancelledError) as error:  # left in the handshake, or closed for another
            logger.debug("%s: the connection was not opened: %s", connection.peer, error)
            self._connections.remove(connection)
            accepted.close()
        finally:
            connection.opening = None

    def _turn_away(self, accepted: socket.socket, context: ssl.SSLContext | None) -> None:
        """Close a connection for which there is no place, with a word where that takes no handshake."""
        with accepted:
            if context is None:
                accepted.setblocking(False)
                try:
                    accepted.send(self.refusal())
                    accepted.shutdown(socket.SHUT_WR)
                except OSError as error:
                    logger.debug("a refused connection is gone: %s", error)

    async def _end_connections(self) -> None:
        """Let responses under way end within `close_seconds`; then cut them."""
        self._connections.is_closing_soon = True
        self._connections.end_all()
        if not await self._wait_until_closed(self.close_seconds):
            logger.warning("%d connections are cut: their responses did not end in time", len(self._connections))
            self._connections.abort_all()
            await self._wait_until_closed(CONNECTION_DRAIN_SECONDS)
        await end_tasks(*self._connections.tasks)

    async def _wait_until_closed(self, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while len(self._connections) and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        return not len(self._connections)


def _max_connections(config: PagodaConfig) -> int:
    """`max_connections`, or what the open files of this process allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each of the two ports may have as many.
    possible = max(1, (files - RESERVED_FILES) // 2)
    if files == resource.RLIM_INFINITY or config.max_connections <= possible:
        return config.max_connections
    logger.warning(
        "max_connections is %d instead of %d: this process may have %d open files",
        possible,
        config.max_connections,
        files,
    )
    return possible
