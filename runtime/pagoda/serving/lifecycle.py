"""The life cycle of a server: listening from the first second, ready when the model is, draining after a signal, then exit.

    listen ─▶ load ─▶ serve ──signal──▶ drain ─▶ close ─▶ exit 0
                └───────┴──engine dead──┴───────▶ close ─▶ exit 1

While it drains the port stays open: requests from a proxy whose endpoints are not updated yet get a 503, not a refused
connection. A server whose engine is dead (and not restarting) exits, so that Kubernetes restarts it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from pagoda.engine.health import EngineState
from pagoda.errors import PagodaError
from pagoda.serving.context import ServingContext
from pagoda.serving.forced_exit import force_exit_after

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_OK = 0
EXIT_FAILED = 1
ABORT_TIMEOUT_SECONDS = 2.0
"""For aborted requests to send their error to their clients."""
SHUTDOWN_TIMEOUT_SECONDS = 20.0
"""From the end of the last request to the end of the process; then it exits by force."""


class Lifecycle:
    """Waits for a signal or a failure, and shuts the server down in order."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._signals = 0
        self._reloading: asyncio.Future[None] | None = None
        self._signalled = asyncio.Event()
        self._signalled_again = asyncio.Event()
        self._engine_dead = asyncio.Event()
        context.health.subscribe(self._on_health)

    def catch_signals(self, reload: Callable[[], Awaitable[None]]) -> None:
        """From now on the first signal drains the server, and the second aborts the requests still running.

        On SIGHUP `reload` is called, which reads the settings again.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._reload(reload))
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    async def run(self, loading: Awaitable[None], server: asyncio.Future[None]) -> int:
        """Serve until the end; returns the exit status. `server` is the REST port, which must not end by itself."""
        status = await self._run(loading, server)
        force_exit_after(SHUTDOWN_TIMEOUT_SECONDS, status)
        return status

    async def _run(self, loading: Awaitable[None], server: asyncio.Future[None]) -> int:
        context = self._context
        loader = asyncio.ensure_future(loading)
        signalled = asyncio.ensure_future(self._signalled.wait())
        engine_dead = asyncio.ensure_future(self._engine_dead.wait())
        ends: set[asyncio.Future[Any]] = {server, signalled, engine_dead}
        try:
            await asyncio.wait(ends | {loader}, return_when=asyncio.FIRST_COMPLETED)
            if loader.done() and not signalled.done() and not server.done() and _failure(loader) is None:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if signalled.done():
                await self._drain()
                return EXIT_FAILED if context.health.state is EngineState.DEAD else EXIT_OK
            cause = _failure(server) or _failure(loader) or context.health.cause
            context.health.fail(str(cause))  # which logs it, but for a server that was dead already
            if str(cause) != context.health.cause or not isinstance(cause, PagodaError | str):
                self._log_failure(cause)
            await self._wait_until_idle(ABORT_TIMEOUT_SECONDS)
            return EXIT_FAILED
        finally:
            for task in (loader, signalled, engine_dead):
                task.cancel()
            await asyncio.gather(loader, signalled, engine_dead, return_exceptions=True)

    async def _drain(self) -> None:
        """Let running requests finish within the grace period; abort them after it, or on a second signal."""
        context = self._context
        grace = context.config.grace_period_seconds
        logger.info(
            "draining: %d running requests have %g s to finish; a second signal aborts them now",
            context.models.num_running,
            grace,
        )
        context.health.drain("the server received a stop signal")
        signalled_again = asyncio.ensure_future(self._signalled_again.wait())
        idle = asyncio.ensure_future(context.models.wait_until_idle())
        await asyncio.wait((signalled_again, idle), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for task in (signalled_again, idle):
            task.cancel()
        if context.models.num_running:
            logger.warning("aborting %d requests that did not finish in time", context.models.num_running)
            context.models.stop()
            await self._wait_until_idle(ABORT_TIMEOUT_SECONDS)

    async def _wait_until_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._context.models.wait_until_idle()
        except TimeoutError:
            logger.warning("%d aborted requests are still running", self._context.models.num_running)

    def _reload(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reloading = asyncio.ensure_future(reload())  # kept, for the loop does not

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        logger.info("received %s", signal.Signals(number).name)
        (self._signalled if self._signals == 1 else self._signalled_again).set()

    def _on_health(self) -> None:
        if self._context.health.state is EngineState.DEAD:
            self._engine_dead.set()

    @staticmethod
    def _log_failure(cause: object) -> None:
        if isinstance(cause, BaseException) and not isinstance(cause, PagodaError):
            logger.error("shutting down after an internal error", exc_info=cause)
        else:
            logger.error("shutting down: %s", cause)


def _failure(task: asyncio.Future[Any]) -> BaseException | None:
    """What a task that is done failed with."""
    return task.exception() if task.done() and not task.cancelled() else None
