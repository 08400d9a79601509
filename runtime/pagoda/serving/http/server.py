"""The REST port: accepts connections within bounds, keeps their deadlines, and ends them in order."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from functools import partial
from http import HTTPStatus

from starlette.types import ASGIApp

from pagoda.config.schema import PagodaConfig
from pagoda.engine.health import EngineState
from pagoda.serving.certificates import CertificateFiles
from pagoda.serving.health import ServerHealth
from pagoda.serving.http.connections import Connections, HttpLimits
from pagoda.serving.http.disconnect import end_tasks
from pagoda.serving.http.exchange import encode_refusal
from pagoda.serving.http.protocol import HttpProtocol

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5
CONNECTION_DRAIN_SECONDS = 1.0
RESERVED_FILES = 256
"""Open files that are kept for other things than connections of this port."""

ACCEPTED_AT_ONCE = 64

_POLL_SECONDS = 0.02
_NO_FILE_LEFT_SECONDS = 0.1


class HttpServer:
    """Serves an ASGI application from `serve` until `close`."""

    def __init__(self, app: ASGIApp, config: PagodaConfig, health: ServerHealth) -> None:
        self._app = app
        self._config = config
        self._health = health
        max_connections = _max_connections(config)
        per_peer = config.max_connections_per_peer or max(1, max_connections // 2)
        self._limits = HttpLimits.from_config(config)
        self._connections = Connections(self._limits, max_connections, per_peer)
        self._closing = asyncio.Event()
        health.subscribe(self._on_health)

    async def serve(self, listener: socket.socket) -> None:
        """Serve on `listener` until `close`; raises `ConfigError` for a certificate or key that cannot be used."""
        certificate = CertificateFiles.from_config(self._config)
        context = None if certificate is None else _tls_context(certificate)
        endless = [asyncio.ensure_future(self._connections.watch())]
        if certificate is not None and context is not None:
            load = partial(context.load_cert_chain, certificate.certfile, certificate.keyfile)
            endless.append(asyncio.ensure_future(certificate.reload_when_renewed(load, "REST")))
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

    async def drain_connections(self) -> None:
        """Give clients with idle connections `CONNECTION_DRAIN_SECONDS` to send a request, whose response closes them.

        A connection that is closed while its client sends a request loses that request, for the client cannot know whether it
        was begun.
        """
        await self._wait_until_closed(CONNECTION_DRAIN_SECONDS)

    def close(self) -> None:
        """Stop listening; `serve` returns when running responses are sent, or after `CLOSE_SECONDS`."""
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
            connection = HttpProtocol(self._app, self._connections, (address[0], address[1]))
            if self._connections.admit(connection, address[0]):
                connection.opening = loop.create_task(self._open(connection, accepted, context))
            else:
                self._turn_away(accepted, context)

    async def _open(self, connection: HttpProtocol, accepted: socket.socket, context: ssl.SSLContext | None) -> None:
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
        """Close a connection for which there is no place, with a 503 where that takes no handshake."""
        with accepted:
            if context is None:
                message = "the server has as many connections as it may (max_connections, max_connections_per_peer)"
                refusal = encode_refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, self._connections.date_header)
                accepted.setblocking(False)
                try:
                    accepted.send(refusal)
                    accepted.shutdown(socket.SHUT_WR)
                except OSError as error:
                    logger.debug("a refused connection is gone: %s", error)

    async def _end_connections(self) -> None:
        """Let responses under way end within `CLOSE_SECONDS`; then cut them."""
        self._connections.is_closing_soon = True
        self._connections.end_all()
        if not await self._wait_until_closed(CLOSE_SECONDS):
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

    def _on_health(self) -> None:
        if self._health.state is EngineState.DRAINING:
            self._connections.is_closing_soon = True


def _tls_context(certificate: CertificateFiles) -> ssl.SSLContext:
    certificate.check()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certfile, certificate.keyfile)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _max_connections(config: PagodaConfig) -> int:
    """`max_connections`, or what the open files of this process allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The port of gRPC may have as many.
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
