"""The gRPC port: inference, health and reflection on one `grpc.aio` server, with or without TLS."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server as add_reflection

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.serving.auth.scopes import Access
from pagoda.serving.certificates import CertificateFiles
from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.handlers import InferenceHandlers
from pagoda.serving.grpc.health import HealthService
from pagoda.serving.grpc.message_reader import MessageReader
from pagoda.serving.grpc.messages import POOL, SERVICE_NAME
from pagoda.serving.grpc.public_services import PublicServices
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger("pagoda.serving.grpc")

MAX_CONCURRENT_STREAMS = 2048
"""RPCs at once on one connection; more wait in the client. The engine's bounded queue is the limit over all."""
MAX_CONCURRENT_RPCS = 16384
"""RPCs at once on all connections, streams that wait among them; more are RESOURCE_EXHAUSTED."""
WINDOW_BYTES = 64 * 1024
"""What a stream holds of a message that nobody asks for yet."""
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20
SHORTEST_CLIENT_PING_SECONDS = 10
IDLE_SECONDS = 300
"""Time without an RPC after which a connection is closed; a client of gRPC opens another when it needs one."""
MILLISECONDS = 1000


class GrpcServer:
    """Serves `service`; listens from `start()` on, whatever state the engine is in."""

    def __init__(self, context: ServingContext, service: V2Service) -> None:
        self._config = context.config
        self._context = context
        self._service = service
        self._stopping = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._certificate: _Certificate | None = None
        self._renewing: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve; `port` is then the real one. `ConfigError` for a port that is taken or a bad certificate."""
        server = grpc.aio.server(options=_options(self._config), maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS)
        reader = MessageReader(self._config)
        handlers = InferenceHandlers(self._context, self._service, reader, self._stopping)

        async def read(call: grpc.aio.ServicerContext) -> bytes | None:
            return await reader.read(call, is_known=await handlers.admit(Access.PUBLIC, call))

        public = PublicServices(read)
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(self._context.health, self._stopping), public)
        names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        add_reflection(reflection.aio.ReflectionServicer(names, pool=POOL), public)
        server.add_generic_rpc_handlers((handlers.generic_handler(), *public.generic_handlers))
        self.port = self._bind(server)
        await server.start()
        self._server = server
        logger.info("gRPC%s on %s", " with TLS" if self._certificate else "", _address(self._config, self.port))

    async def stop(self, grace: float) -> None:
        """Refuse new RPCs, let the running ones end within `grace` seconds, then cancel the rest.

        Health watchers get NOT_SERVING first; streams end when their running requests have ended.
        """
        self._stopping.set()
        if self._renewing is not None:
            self._renewing.cancel()
        if self._server is not None:
            await self._server.stop(grace)

    def _bind(self, server: grpc.aio.Server) -> int:
        config = self._config
        address = _address(config, config.grpc_port)
        files = CertificateFiles.from_config(config)
        try:
            if files is None:
                return int(server.add_insecure_port(address))
            files.check()
            certificate = self._certificate = _Certificate(files)
            port = int(server.add_secure_port(address, certificate.credentials()))
        except RuntimeError as error:
            settings = "host, grpc_port" if files is None else "host, grpc_port, ssl_certfile, ssl_keyfile"
            raise ConfigError(f"cannot listen on {address}; check {settings}: {error}") from error
        self._renewing = asyncio.ensure_future(files.reload_when_renewed(certificate.load, "gRPC"))
        return port


class _Certificate:
    """The certificate that handshakes use, which is replaced while the server runs."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._renewed: grpc.ServerCertificateConfiguration | None = None
        self._current = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Those of a port, which ask here before each handshake."""
        return grpc.dynamic_ssl_server_credentials(self._current, self._fetch)

    def load(self) -> None:
        """Use what the files hold now, from the next handshake on; raises `OSError`."""
        self._renewed = self._read()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """A certificate that is new since the last call; called by grpc, in a thread of its own."""
        renewed, self._renewed = self._renewed, None
        return renewed

    def _read(self) -> grpc.ServerCertificateConfiguration:
        key, certificate = (Path(path).read_bytes() for path in (self._files.keyfile, self._files.certfile))
        return grpc.ssl_server_certificate_configuration([(key, certificate)])


def _options(config: PagodaConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_grpc_message_bytes),
        # What was generated is sent; the client has a limit of its own.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.server_handshake_timeout_ms", int(config.header_timeout_seconds * MILLISECONDS)),
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * MILLISECONDS),
        # Without measuring the path: that would let a stream hold megabytes of a message that is not received.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Two servers on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * MILLISECONDS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", SHORTEST_CLIENT_PING_SECONDS * MILLISECONDS),
    ]


def _address(config: PagodaConfig, port: int) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{host}:{port}"
