"""`grpc.health.v1.Health`, the protocol of Kubernetes' grpc probes and of load balancers, shown from the server's health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2

from pagoda.serving.grpc.call import Call, CallError
from pagoda.serving.grpc.messages import SERVICE_NAME
from pagoda.serving.health import Health

SERVICES = ("", SERVICE_NAME)
"""The server as a whole and the inference service; both are SERVING while requests are accepted."""


MAX_WATCHES = 1024


class HealthService:
    """Check responds at once; Watch sends every change until the client leaves or `stopping` is set."""

    def __init__(self, health: Health, stopping: asyncio.Event) -> None:
        self._health = health
        self._stopping = stopping
        self._num_watches = 0

    async def Check(self, request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """SERVING or NOT_SERVING; NOT_FOUND for a service that is not here."""
        if request.service not in SERVICES:
            raise CallError(grpc.StatusCode.NOT_FOUND, f"service {request.service[:200]!r} is not served here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, call: Call
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and after each change; SERVICE_UNKNOWN, and no error, for a service that is not here."""
        if self._num_watches >= MAX_WATCHES:
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} clients watch already")
        self._num_watches += 1
        changed = asyncio.Event()
        unsubscribe = self._health.subscribe(changed.set)
        stopping = asyncio.ensure_future(self._stopping.wait())
        sent = None
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != sent:
                    yield health_pb2.HealthCheckResponse(status=status)
                    sent = status
                if self._stopping.is_set():
                    return
                change = asyncio.ensure_future(changed.wait())
                try:
                    await asyncio.wait((change, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
        finally:
            self._num_watches -= 1
            stopping.cancel()
            unsubscribe()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in SERVICES:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._health.is_ready and not self._stopping.is_set():
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING
