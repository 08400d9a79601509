"""The REST port: KServe's REST server on our own socket, with a bound on request heads and none of KServe's routes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import fastapi
import uvicorn
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer, _RefreshingServer

from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError
from pagoda.serving.app import install
from pagoda.serving.context import ServingContext
from pagoda.serving.http.listener import BACKLOG
from pagoda.serving.http.protocol import bounded_protocol
from pagoda.serving.kserve.model import EngineDataPlane

KEEP_ALIVE_SECONDS = 65  # longer than the 60 s of the usual proxies, so that it is they who close idle connections
CLOSE_SECONDS = 5
FAREWELL_SECONDS = 1.0
"""For clients between two requests on one connection: time to ask once more, and be told to open another one."""

_LOOK_SECONDS = 0.02
_CLOSE = (b"connection", b"close")


class _Server(_RefreshingServer):  # type: ignore[misc]  # kserve is not typed
    """uvicorn's server (renewing its certificate as KServe does), with signals left to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the business of `serving.lifecycle`, which ends requests before it ends this server."""
        yield


class HttpServer(RESTServer):  # type: ignore[misc]  # kserve is not typed
    """KServe's REST server, with our address, limits and routes."""

    def __init__(
        self,
        app: fastapi.FastAPI,
        context: ServingContext,
        plane: EngineDataPlane,
        extension: ModelRepositoryExtension,
    ) -> None:
        config = context.config
        super().__init__(app, plane, extension, config.http_port)
        self._app = app
        self._context = context
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
        context.health.subscribe(self._on_health)

    def create_application(self) -> None:
        """Our routes and nothing else; KServe's would answer on the paths that are left."""
        install(self._app, self._context, self.dataplane)

    async def serve(self, listener: socket.socket) -> None:
        """Serve on `listener` until `close`; raises `ConfigError` for a certificate or key that cannot be used."""
        self.create_application()
        try:
            self.config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"ssl_certfile, ssl_keyfile: {error}") from error
        await self._server.serve(sockets=[listener])

    async def say_farewell(self) -> None:
        """While it drains, every answer ends its connection; give clients a moment to get one.

        A connection that is closed while its client sends a request loses that request, for the client cannot know whether it
        was begun.
        """
        deadline = asyncio.get_running_loop().time() + FAREWELL_SECONDS
        while self._server.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)

    def _on_health(self) -> None:
        if self._context.health.state is EngineState.DRAINING and _CLOSE not in self.config.encoded_headers:
            self.config.encoded_headers.append(_CLOSE)  # of all answers from the next second on
            self._server.server_state.default_headers.append(_CLOSE)  # of those before, and of those under way

    def close(self) -> None:
        """Stop listening; `serve` returns when the answers under way are sent, or after `CLOSE_SECONDS`."""
        self._server.should_exit = True
