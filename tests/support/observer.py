"""Watches a real server from outside: its health as REST and gRPC tell it, its metrics, and what it leaves behind."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import ServerProcess

LOOK_SECONDS = 0.05
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class Sight:
    """One look at the server. `time`: monotonic seconds."""

    time: float
    state: str
    is_ready: bool
    is_live: bool


class Observer:
    """Looks at `/health`, the live probe and gRPC's Watch all the time while the block runs."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.sights: list[Sight] = []
        self.watched: list[int] = []

    async def __aenter__(self) -> Observer:
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._server.port}", timeout=60)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._server.grpc_port}")
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._watch())]
        await self.until_state("ready")
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()
        await self._channel.close()

    async def _look(self) -> None:
        while True:
            begun = time.monotonic()  # an answer may be as old as its request
            with suppress(httpx.TransportError):
                report, live = await asyncio.gather(self._http.get("/health"), self._http.get("/v2/health/live"))
                sight = Sight(begun, report.json()["state"], report.status_code == 200, live.status_code == 200)
                self.sights.append(sight)
            await asyncio.sleep(LOOK_SECONDS)

    async def _watch(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for response in health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest()):
                self.watched.append(response.status)

    async def until_state(self, *states: str, seconds: float = 90.0) -> Sight:
        """The first sight from now on of one of these states."""
        seen = len(self.sights)
        async with asyncio.timeout(seconds):
            while True:
                for sight in self.sights[seen:]:
                    if sight.state in states:
                        return sight
                await asyncio.sleep(0.01)

    async def health(self) -> dict[str, Any]:
        """The body of `/health`."""
        return dict((await self._http.get("/health")).json())

    async def metrics(self) -> dict[str, float]:
        """Every sample without its prefix, as `name[label values]`."""
        found = {}
        for family in text_string_to_metric_families((await self._http.get("/metrics")).text):
            for sample in family.samples:
                values = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
                name = sample.name.removeprefix("pagoda_")
                found[f"{name}[{','.join(values)}]" if values else name] = sample.value
        return found

    async def until_idle(self, seconds: float = 60.0) -> None:
        """Nothing runs, nothing waits, no block is held; and the engine, which checks the same, is still there."""
        async with asyncio.timeout(seconds):
            while True:
                report = await self.health()
                if (report["running"], report["waiting"], report["kv_cache_usage"]) == (0, 0, 0.0):
                    break
                await asyncio.sleep(LOOK_SECONDS)
        figures = await self.metrics()
        assert figures["num_requests_running"] == figures["num_requests_waiting"] == figures["kv_cache_usage_perc"] == 0
        assert figures["prefix_cache_hits_total"] <= figures["prefix_cache_queries_total"]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def is_there(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
