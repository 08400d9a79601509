"""KServe's `ModelServer` with our REST and gRPC servers, our data plane and our life cycle in it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from kserve import ModelServer, model_server

from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.server import GrpcServer
from pagoda.serving.http.server import HttpServer
from pagoda.serving.kserve.model import EngineDataPlane, PagodaModel
from pagoda.serving.lifecycle import EXIT_OK, Lifecycle

logger = logging.getLogger(__name__)

GRPC_CLOSE_SECONDS = 2.0


class PagodaModelServer(ModelServer):  # type: ignore[misc]  # kserve is not typed
    """One model, one process, one event loop. `load` brings the model up; the ports are open before it is called."""

    def __init__(self, context: ServingContext, load: Callable[[], Awaitable[None]]) -> None:
        config = context.config
        super().__init__(
            http_port=config.http_port,
            grpc_port=config.grpc_port,
            workers=1,
            enable_grpc=False,
            enable_latency_logging=False,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
        self.context = context
        self.dataplane = EngineDataPlane(self.registered_models, context)
        self.model = PagodaModel(context, load)
        self.register_model(self.model)

    async def serve(self, listener: socket.socket) -> int:
        """Serve until told to stop or without an engine; returns the exit status.

        Raises `ConfigError` for a gRPC port that cannot be had.
        """
        context = self.context
        lifecycle = Lifecycle(context)
        lifecycle.catch_signals()
        http = HttpServer(model_server.app, context, self.dataplane, self.model_repository_extension)
        grpc = GrpcServer(context)
        await grpc.start()
        scheme = "https" if context.config.ssl_certfile else "http"
        host, port = listener.getsockname()[:2]
        logger.info("REST on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
        serving = asyncio.ensure_future(http.serve(listener))
        try:
            status = await lifecycle.run(self.model.start_engine(), serving)
            if status == EXIT_OK:
                await http.say_farewell()
            return status
        finally:
            http.close()
            await asyncio.gather(serving, grpc.stop(GRPC_CLOSE_SECONDS), return_exceptions=True)
