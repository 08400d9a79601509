"""A release on a cluster of pods: rendered, installed, upgraded and asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.pods.cluster import Cluster
from tests.support.chart import render, render_documents
from tests.support.load import Ask, Clients

MOST_TRIES = 20
RETRY_SECONDS = 0.5


@dataclass
class ServiceAddress:
    """Where the release's Service is, as its clients see it."""

    host: str
    port: int
    grpc_port: int


class Release:
    """`helm install` and `helm upgrade` of the chart."""

    def __init__(self, cluster: Cluster, values: dict[str, Any]) -> None:
        self.cluster = cluster
        self.values = values

    async def install(self, **changes: Any) -> None:
        """Install, or upgrade to changed values; returns when the objects are applied."""
        self.values = self.values | changes
        await self.cluster.apply(render_documents(self.values))

    async def run_test(self) -> str:
        """`helm test`: what its pod has written; AssertionError if it fails."""
        pod = render(self.values)["Pod"]
        name = pod["metadata"]["name"]
        await self.cluster.apply([pod])
        await self.cluster.wait(lambda: self.cluster.pods[name].phase, f"{name} ended", 150)
        assert self.cluster.pods[name].phase == "Succeeded", self.cluster.pods[name].log("ask")
        return self.cluster.pods[name].log("ask")

    @property
    def address(self) -> ServiceAddress:
        """The Service of the release."""
        service = render(self.values)["Service"]
        ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
        host = self.cluster.network.service_address(service["metadata"]["name"])
        return ServiceAddress(host, ports["http1"], ports["h2c"])

    def clients(self) -> Clients:
        """One client of every door, with its connections."""
        return Clients(self.address, host=self.address.host)


@dataclass
class Ledger:
    """What became of a load's requests."""

    finished: Counter[str] = field(default_factory=Counter)
    retried: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"{self.finished.total()} finished, {len(self.retried)} retried, {len(self.lost)} lost"


@asynccontextmanager
async def steady_load(release: Release, asks: dict[Ask, str], pause_seconds: float = 0.1) -> AsyncIterator[Ledger]:
    """One client with connections of its own for each question, asking again and again while the block runs.

    A client retries what docs/protocol.md tells it to (429, 503, UNAVAILABLE, CANCELLED before anything came) and nothing
    else: a broken connection, another error, or an answer that is not the expected one is a lost request. `asks`: the
    expected texts.
    """
    ledger = Ledger()
    is_over = False

    async def one(ask: Ask, expected: str) -> None:
        async with release.clients() as clients:
            while not is_over:
                await _ask_until_answered(clients, ask, expected, ledger)
                await asyncio.sleep(pause_seconds)

    tasks = [asyncio.create_task(one(ask, expected)) for ask, expected in asks.items()]
    try:
        yield ledger
        is_over = True
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask_until_answered(clients: Clients, ask: Ask, expected: str, ledger: Ledger) -> None:
    for _ in range(MOST_TRIES):
        try:
            answer = await clients.run(ask)
        except (httpx.TransportError, AssertionError) as error:
            ledger.lost.append(f"{ask}: {error!r}")
            return
        if answer.end == "finished" and answer.text == expected:
            ledger.finished[ask.door] += 1
            return
        # gRPC's own library ends a call so that reaches the port as it closes.
        was_not_begun = answer.end == "refused" and answer.error.startswith("CANCELLED")
        if answer.end == "finished" or not (answer.is_retriable or was_not_begun):
            ledger.lost.append(f"{ask}: {answer}")
            return
        ledger.retried.append(f"{ask}: {answer.error}")
        await asyncio.sleep(RETRY_SECONDS)
    ledger.lost.append(f"{ask}: still refused after {MOST_TRIES} tries")
