"""A request that fails leaves nothing for the cyclic garbage collector: its objects go when it does."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from starlette.requests import ClientDisconnect, Request

from pagoda.errors import DeadlineExceededError, EngineNotReadyError, RequestFailedError
from pagoda.request import GenerationRequest
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.text.output import GenerationChunk
from tests.support.jobs import AnyNumber, job, runner_of


class Failing:
    """A generator that gives one token and then fails, or hangs."""

    client = AnyNumber()

    def __init__(self, *, hangs: bool = False) -> None:
        self._hangs = hangs

    async def generate(
        self, request: GenerationRequest, places: object = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        yield GenerationChunk(text="x", token_ids=[1])
        if self._hangs:
            await asyncio.Event().wait()
        raise RequestFailedError("failed as asked")


def silent_request() -> Request:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    return Request({"type": "http", "path": "/", "headers": []}, receive)


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def caught(run: Callable[[], Awaitable[Any]], kind: type[BaseException]) -> weakref.ref[BaseException]:
    """The error that `run` raises, after it was dealt with."""
    try:
        await run()
    except kind as error:
        return weakref.ref(error)
    raise AssertionError("it did not fail")


async def failed() -> None:
    await runner_of(Failing()).collect(job(), "r")


async def one_of_several_failed() -> None:
    await runner_of(Failing()).collect_all([job(), job()], "r")


async def one_of_several_streams_failed() -> None:
    async with aclosing(runner_of(Failing()).stream_all([job(), job()], "r")) as chunks:
        async for _ in chunks:
            pass


async def timed_out() -> None:
    await runner_of(Failing(hangs=True)).collect(job(0.01), "r")


async def past_its_deadline() -> None:
    await runner_of(Failing(hangs=True)).collect(job(1e-9), "r")


async def stopped() -> None:
    runner = runner_of(Failing(hangs=True))
    asyncio.get_running_loop().call_later(0.01, runner.stop)
    await runner.collect(job(), "r")


async def refused_stream() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        if True:
            raise RequestFailedError("before the first event")
        yield b""

    await open_event_stream(silent_request(), events(), lambda report: {}, cast("Metrics", None))


async def failed_whole() -> None:
    await until_disconnect(silent_request(), runner_of(Failing()).collect(job(), "r"))


async def left() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "path": "/", "headers": []}, receive)
    await until_disconnect(request, runner_of(Failing(hangs=True)).collect(job(), "r"))


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (failed, RequestFailedError),
        (one_of_several_failed, RequestFailedError),
        (one_of_several_streams_failed, RequestFailedError),
        (timed_out, DeadlineExceededError),
        (past_its_deadline, DeadlineExceededError),
        (stopped, EngineNotReadyError),
        (refused_stream, RequestFailedError),
        (failed_whole, RequestFailedError),
        (left, ClientDisconnect),
    ],
)
async def test_the_error_of_a_failed_request_is_freed_without_a_collection(
    run: Callable[[], Awaitable[Any]], kind: type[BaseException]
) -> None:
    error = await caught(run, kind)
    await asyncio.sleep(0)  # for callbacks of the tasks that have ended
    assert error() is None
