"""The gRPC port: inference, health and reflection on one `grpc.aio` server, with or without TLS."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.handlers import InferenceHandlers
from pagoda.serving.grpc.health import HealthService
from pagoda.serving.grpc.messages import POOL, SERVICE_NAME
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger("pagoda.serving.grpc")

MAX_CONCURRENT_STREAMS = 2048
"""RPCs at once on one connection; more wait in the client. The engine's bounded queue is the limit over all."""
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20
SHORTEST_CLIENT_PING_SECONDS = 10
MILLISECONDS = 1000


class GrpcServer:
    """Serves `service`; listens from `start()` on, whatever state the engine is in."""

    def __init__(self, context: ServingContext, service: V2Service) -> None:
        self._config = context.config
        self._context = context
        self._service = service
        self._stopping = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve; `port` is then the real one. `ConfigError` for a port that is taken or a bad certificate."""
        server = grpc.aio.server(options=_options(self._config))
        handlers = InferenceHandlers(self._context, self._service, self._stopping)
        server.add_generic_rpc_handlers((handlers.generic_handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(self._context.health, self._stopping), server)
        names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, pool=POOL)
        self.port = _bind(server, self._config)
        await server.start()
        self._server = server
        logger.info("gRPC%s on %s", " with TLS" if self._config.ssl_certfile else "", _address(self._config, self.port))

    async def stop(self, grace: float) -> None:
        """Refuse new RPCs, let the running ones end within `grace` seconds, then cancel the rest.

        Health watchers get NOT_SERVING first; streams end when their running requests have ended.
        """
        self._stopping.set()
        if self._server is not None:
            await self._server.stop(grace)


def _options(config: PagodaConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_grpc_message_bytes),
        # What was generated is sent; the client has a limit of its own.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
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


def _bind(server: grpc.aio.Server, config: PagodaConfig) -> int:
    address = _address(config, config.grpc_port)
    try:
        if config.ssl_certfile is None or config.ssl_keyfile is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, _credentials(config.ssl_certfile, config.ssl_keyfile)))
    except RuntimeError as error:
        settings = "host, grpc_port" if config.ssl_certfile is None else "host, grpc_port, ssl_certfile, ssl_keyfile"
        raise ConfigError(f"cannot listen on {address}; check {settings}: {error}") from error


def _credentials(certificate_file: str, key_file: str) -> grpc.ServerCredentials:
    contents = []
    for name, path in (("ssl_keyfile", key_file), ("ssl_certfile", certificate_file)):
        try:
            contents.append(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from error
    return grpc.ssl_server_credentials([(contents[0], contents[1])])
