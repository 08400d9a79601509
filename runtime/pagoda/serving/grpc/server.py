"""The gRPC port: inference, health and reflection over HTTP/2, with or without TLS.

Not a server of `grpc.aio`: that receives a message whole whatever its size, has no bound on the connections of a peer nor on
the bytes of messages, keeps a large one five times, and takes three times the processor time for a token.
"""

from __future__ import annotations

import asyncio
import logging

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server as add_reflection

from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.call import Call
from pagoda.serving.grpc.connection import GrpcConnection, Handler
from pagoda.serving.grpc.handlers import InferenceHandlers
from pagoda.serving.grpc.health import HealthService
from pagoda.serving.grpc.message_reader import MessageReader, Received
from pagoda.serving.grpc.messages import POOL, SERVICE_NAME
from pagoda.serving.grpc.public_services import PublicServices
from pagoda.serving.http.connection_server import ConnectionServer
from pagoda.serving.http.listener import listen
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger("pagoda.serving.grpc")

MAX_CONCURRENT_CALLS = 16384
"""Calls at once on all connections, streams that wait among them; more are RESOURCE_EXHAUSTED."""


class GrpcServer(ConnectionServer):
    """Serves `service`; listens from `start()` on, whatever state the engine is in."""

    protocol = "gRPC"
    alpn = "h2"

    def __init__(self, context: ServingContext, service: V2Service) -> None:
        super().__init__(context.config)
        self._context = context
        self._service = service
        self._stopping = asyncio.Event()
        self._handlers: dict[str, Handler] = {}
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve; `port` is then the real one. `ConfigError` for a port that is taken or a bad certificate."""
        config = self._config
        context = self.tls_context()
        listener = listen(config.host, config.grpc_port, "grpc_port")
        self._handlers = self._make_handlers()
        host, self.port = listener.getsockname()[:2]
        self._serving = asyncio.ensure_future(self.serve(listener, context))
        await asyncio.sleep(0)  # it listens
        address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        logger.info("gRPC%s on %s", "" if context is None else " with TLS", address)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let the running ones end within `grace` seconds, then cut the rest.

        Health watchers get NOT_SERVING first; streams end when their running requests have ended.
        """
        self._stopping.set()
        self.close_seconds = grace
        self.close()
        if self._serving is not None:
            await self._serving

    def make_connection(self, address: tuple[str, int]) -> GrpcConnection:
        """Speaks HTTP/2."""
        return GrpcConnection(self._handlers, self._connections, address, MAX_CONCURRENT_CALLS)

    def refusal(self) -> bytes:
        """Nothing: without settings a client knows no call."""
        return b""

    def _make_handlers(self) -> dict[str, Handler]:
        reader = MessageReader(self._config, self._context.decoding)
        handlers = InferenceHandlers(self._context, self._service, reader, self._stopping)

        async def read(call: Call) -> Received | None:
            is_known = await handlers.admit(Access.PUBLIC, call)
            return await (reader.read_next(call) if is_known else reader.read_unknown(call))

        public = PublicServices(read)
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(self._context.health, self._stopping), public)
        names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        add_reflection(reflection.aio.ReflectionServicer(names, pool=POOL), public)
        return {**handlers.handlers(), **public.handlers}
