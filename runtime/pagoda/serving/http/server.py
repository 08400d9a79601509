"""The REST port: uvicorn on a socket that listens already, with bounded request headers and certificate renewal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from pagoda.config.schema import PagodaConfig
from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError
from pagoda.serving.health import ServerHealth
from pagoda.serving.http.certificates import reload_when_renewed
from pagoda.serving.http.listener import BACKLOG
from pagoda.serving.http.protocol import bounded_protocol

KEEP_ALIVE_SECONDS = 65  # longer than the 60 s of the usual proxies, so that it is they who close idle connections
CLOSE_SECONDS = 5
CONNECTION_DRAIN_SECONDS = 1.0

_POLL_SECONDS = 0.02
_CLOSE = (b"connection", b"close")


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are left to `serving.lifecycle`, which drains requests before it closes this server."""
        yield


class HttpServer:
    """Serves an ASGI application from `serve` until `close`."""

    def __init__(self, app: ASGIApp, config: PagodaConfig, health: ServerHealth) -> None:
        self._health = health
        self.config = uvicorn.Config(
            app,
            host=config.host,
            port=config.http_port,
            http=bounded_protocol(config.max_header_bytes),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=config.log_level in ("debug", "info"),
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
        self._server = _Server(self.config)
        health.subscribe(self._on_health)

    async def serve(self, listener: socket.socket) -> None:
        """Serve on `listener` until `close`; raises `ConfigError` for a certificate or key that cannot be used."""
        config = self.config
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"ssl_certfile, ssl_keyfile: {error}") from error
        if config.ssl is None:
            await self._server.serve(sockets=[listener])
            return
        renewal = asyncio.create_task(
            reload_when_renewed(config.ssl, str(config.ssl_certfile), str(config.ssl_keyfile))
        )
        try:
            await self._server.serve(sockets=[listener])
        finally:
            renewal.cancel()

    async def drain_connections(self) -> None:
        """Give clients with idle connections `CONNECTION_DRAIN_SECONDS` to send a request, whose response closes them.

        A connection that is closed while its client sends a request loses that request, for the client cannot know whether it
        was begun.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CONNECTION_DRAIN_SECONDS
        while self._server.server_state.connections and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Stop listening; `serve` returns when running responses are sent, or after `CLOSE_SECONDS`."""
        self._server.should_exit = True

    def _on_health(self) -> None:
        if self._health.state is EngineState.DRAINING and _CLOSE not in self.config.encoded_headers:
            self.config.encoded_headers.append(_CLOSE)  # of all responses from the next second on
            self._server.server_state.default_headers.append(_CLOSE)  # of those before, and of running ones
