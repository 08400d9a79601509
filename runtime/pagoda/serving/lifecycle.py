"""The life of a server: listening from the first second, ready when the model is, draining when told to go, then gone.

    listen ─▶ load ─▶ serve ──signal──▶ drain ─▶ close ─▶ exit 0
                └───────┴──engine dead──┴───────▶ close ─▶ exit 1

While it drains the port stays open: what still arrives through a proxy that has not heard of it is answered 503, not with a
refused connection. A server whose engine is dead, which an engine that is started anew is not, does not stay: it exits, so
that whoever started it can start it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable
from typing import Any

from pagoda.engine.health import EngineState
from pagoda.errors import PagodaError
from pagoda.serving import forced_exit
from pagoda.serving.context import ServingContext

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_OK = 0
EXIT_FAILED = 1
LAST_WORDS_SECONDS = 2.0
"""Time for the final errors of cut-off requests to reach their clients."""


class Lifecycle:
    """Waits for what ends the server, and ends it in order."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._signals = 0
        self._signalled = asyncio.Event()
        self._hurried = asyncio.Event()
        self._lost = asyncio.Event()
        context.health.subscribe(self._on_health)

    def catch_signals(self) -> None:
        """From now on the first signal drains the server and the second hurries it."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    async def run(self, loading: Awaitable[None], server: asyncio.Future[None]) -> int:
        """Serve until the end; returns the exit status. `server` is the REST port, which must not end by itself."""
        status = await self._run(loading, server)
        forced_exit.arm(status)
        return status

    async def _run(self, loading: Awaitable[None], server: asyncio.Future[None]) -> int:
        context = self._context
        loader = asyncio.ensure_future(loading)
        signalled = asyncio.ensure_future(self._signalled.wait())
        lost = asyncio.ensure_future(self._lost.wait())
        ends: set[asyncio.Future[Any]] = {server, signalled, lost}
        try:
            await asyncio.wait(ends | {loader}, return_when=asyncio.FIRST_COMPLETED)
            if loader.done() and not signalled.done() and not server.done() and _failure(loader) is None:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if signalled.done():
                await self._drain()
                return EXIT_FAILED if context.health.state is EngineState.DEAD else EXIT_OK
            cause = _failure(server) or _failure(loader) or context.health.cause
            self._say_failure(cause)
            context.health.fail(str(cause))
            await self._wait_until_idle(LAST_WORDS_SECONDS)
            return EXIT_FAILED
        finally:
            for task in (loader, signalled, lost):
                task.cancel()
            await asyncio.gather(loader, signalled, lost, return_exceptions=True)

    async def _drain(self) -> None:
        """Let what runs end within the grace period; then, or on a second signal, end it."""
        context = self._context
        grace = context.config.grace_period_seconds
        logger.info(
            "draining: %d requests under way have %g s to end; a second signal ends them now",
            context.runner.num_running,
            grace,
        )
        context.health.drain("the server was told to stop")
        hurried = asyncio.ensure_future(self._hurried.wait())
        idle = asyncio.ensure_future(context.runner.wait_until_idle())
        await asyncio.wait((hurried, idle), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for task in (hurried, idle):
            task.cancel()
        if context.runner.num_running:
            logger.warning("ending %d requests that did not finish in time", context.runner.num_running)
            context.runner.stop()
            await self._wait_until_idle(LAST_WORDS_SECONDS)

    async def _wait_until_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._context.runner.wait_until_idle()
        except TimeoutError:
            logger.warning("%d requests could not be ended in order", self._context.runner.num_running)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        logger.info("caught %s", signal.Signals(number).name)
        (self._signalled if self._signals == 1 else self._hurried).set()

    def _on_health(self) -> None:
        if self._context.health.state is EngineState.DEAD:
            self._lost.set()

    @staticmethod
    def _say_failure(cause: object) -> None:
        if isinstance(cause, BaseException) and not isinstance(cause, PagodaError):
            logger.error("the server ends on an internal error", exc_info=cause)
        else:
            logger.error("the server ends: %s", cause)


def _failure(task: asyncio.Future[Any]) -> BaseException | None:
    """What a task that is done failed with."""
    return task.exception() if task.done() and not task.cancelled() else None
