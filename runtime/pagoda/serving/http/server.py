"""The REST port."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp

from pagoda.config.schema import PagodaConfig
from pagoda.engine.health import EngineState
from pagoda.serving.health import Health
from pagoda.serving.http.connection_server import CONNECTION_DRAIN_SECONDS, ConnectionServer
from pagoda.serving.http.exchange import encode_refusal
from pagoda.serving.http.protocol import HttpProtocol


class HttpServer(ConnectionServer):
    """Serves an ASGI application from `serve` until `close`."""

    protocol = "REST"
    alpn = "http/1.1"

    def __init__(self, app: ASGIApp, config: PagodaConfig, health: Health) -> None:
        super().__init__(config)
        self._app = app
        self._health = health
        health.subscribe(self._on_health)

    def make_connection(self, address: tuple[str, int]) -> HttpProtocol:
        """Speaks HTTP/1.1."""
        return HttpProtocol(self._app, self._connections, address)

    def refusal(self) -> bytes:
        """A 503."""
        message = "the server has as many connections as it may (max_connections, max_connections_per_peer)"
        return encode_refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, self._connections.date_header)

    async def drain_connections(self) -> None:
        """Give clients with idle connections `CONNECTION_DRAIN_SECONDS` to send a request, whose response closes them.

        A connection that is closed while its client sends a request loses that request, for the client cannot know whether it
        was begun.
        """
        await self._wait_until_closed(CONNECTION_DRAIN_SECONDS)

    def _on_health(self) -> None:
        if self._health.state is EngineState.DRAINING:
            self._connections.is_closing_soon = True
        elif self._health.is_ready:
            self._connections.is_closing_soon = False  # it was drained for a while
