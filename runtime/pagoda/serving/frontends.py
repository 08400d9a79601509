"""The REST and gRPC servers of one process, from listening to closed, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from pagoda.serving.app import create_app
from pagoda.serving.context import ServingContext
from pagoda.serving.greeting import Greeting, address_for_people
from pagoda.serving.grpc.server import GrpcServer
from pagoda.serving.http.server import HttpServer
from pagoda.serving.lifecycle import EXIT_OK, Lifecycle
from pagoda.serving.settings import Settings
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger(__name__)

GRPC_CLOSE_SECONDS = 2.0


async def serve(
    context: ServingContext,
    load: Callable[[], Awaitable[None]],
    listener: socket.socket,
    settings: Settings,
    greeting: Greeting | None = None,
) -> int:
    """Serve until a signal or without an engine; returns the exit status.

    `load` brings the model up; both ports are open before it is called. Raises `ConfigError` for a gRPC port that is taken.
    """
    lifecycle = Lifecycle(context)
    lifecycle.catch_signals(lambda: settings.reload("SIGHUP"))
    service = V2Service(context.models, context.health, context.repository)
    http = HttpServer(create_app(context, service, settings), context.config, context.health)
    grpc = GrpcServer(context, service)
    await grpc.start()
    scheme = "https" if context.config.ssl_certfile else "http"
    host, port = listener.getsockname()[:2]
    logger.info("REST on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    if greeting is not None:
        greeting.listening(
            f"{scheme}://{address_for_people(host, port)}", address_for_people(context.config.host, grpc.port)
        )
    context.keys.log_state(f"{host}:{port}")
    watching = asyncio.gather(context.keys.watch(), settings.watch())
    serving = asyncio.ensure_future(http.serve(listener, http.tls_context()))
    try:
        status = await lifecycle.run(load(), serving)
        if status == EXIT_OK:
            await http.drain_connections()
        return status
    finally:
        http.close()
        watching.cancel()
        await asyncio.gather(watching, serving, grpc.stop(GRPC_CLOSE_SECONDS), return_exceptions=True)
        await context.tracing.close()
