"""Every process of a server is killed and stopped while it is under load."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.chaos import SETTINGS, STALL_SECONDS, asks_of, check_same_answers, references_of, watched
from tests.support.load import load, run_all
from tests.support.notes import Note
from tests.support.observer import is_there
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
ASKS = asks_of()
TOKENIZER_SECONDS = 4.0


@asynccontextmanager
async def running_server(**settings: object) -> AsyncIterator[ServerProcess]:
    with ServerProcess(**SETTINGS | settings) as server:
        server.wait_until_ready()
        yield server


def children_of(server: ServerProcess, name: str) -> list[int]:
    """Process ids of the server's children whose command line has `name` in it."""
    pid = server.process.pid
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if name.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


async def test_a_server_that_was_stopped_for_long_goes_on_where_it_was(note: Note) -> None:
    # So many tokens that the engine, which goes on, must wait for its server to take them.
    asks = asks_of(("generate", "generate_stream", "grpc", "grpc_stream"), lengths=(250,)) * 2
    async with running_server() as server, watched(server) as (clients, observer):
        references = await references_of(clients, asks)
        engine = server.engine_pid()
        running = asyncio.create_task(run_all(clients, asks))
        async with asyncio.timeout(60):
            while (await observer.health())["running"] == 0:
                await asyncio.sleep(0.01)
        server.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3 * STALL_SECONDS)
        server.send_signal(signal.SIGCONT)
        books = await running
        books.check(references)
        note(f"SIGSTOP of the server for {3 * STALL_SECONDS:g} s: {books.summary}")
        assert books.count() == {"finished": len(asks)}
        assert server.engine_pid() == engine
        assert {sight.state for sight in observer.sights} == {"ready"}
        await observer.until_idle()


async def test_an_engine_that_is_killed_again_and_again_comes_back_each_time(note: Note) -> None:
    async with running_server() as server, watched(server) as (clients, observer):
        references = await references_of(clients, ASKS)
        async with load(clients, ASKS, num_clients=8) as books:
            await wait_until_async(lambda: len(books.answers) > 8)
            os.kill(server.engine_pid(), signal.SIGKILL)
            await observer.until_state("starting")
            await wait_until_async(lambda: bool(children_of(server, "pagoda.engine.core.process")))
            os.kill(server.engine_pid(), signal.SIGKILL)  # while it starts
            await observer.until_state("ready", seconds=150)
            os.kill(server.engine_pid(), signal.SIGKILL)
            await observer.until_state("starting")
            await observer.until_state("ready", seconds=150)
        books.check(references)
        note(f"three SIGKILLs of the engine, one of them while it starts: {books.summary}")
        assert all(sight.is_live for sight in observer.sights)
        assert not books.of("failed")
        assert all(answer.is_retriable for answer in books.of("refused"))
        await observer.until_idle()
        await check_same_answers(clients, ASKS, references)
        assert "attempt 3 of" in server.log


async def test_an_engine_that_is_killed_every_five_seconds_fails_no_stream(note: Note) -> None:
    asks = asks_of(("generate_stream", "completions", "grpc_stream"), lengths=(60, 250))
    async with running_server(max_engine_restarts=100, spare_process_seconds=0.5) as server, watched(server) as both:
        clients, observer = both
        references = await references_of(clients, asks)
        async with load(clients, asks, num_clients=32) as books:
            for _ in range(12):
                await asyncio.sleep(5)
                await observer.until_state("ready", seconds=60)
                os.kill(server.engine_pid(), signal.SIGKILL)
                await observer.until_state("starting")
            await observer.until_state("ready", seconds=60)
        books.check(references)
        figures = await observer.metrics()
        note(f"12 SIGKILLs of the engine: {books.summary}; {figures['request_replays_total']:g} replays")
        assert not books.of("failed")
        assert figures["request_replays_total"] > 32
        assert all(sight.is_live for sight in observer.sights)
        await observer.until_idle()
        await check_same_answers(clients, asks, references)


async def test_tokenizer_processes_that_are_killed_or_stopped_are_replaced(note: Note) -> None:
    settings = {"tokenizer_pool_type": "process", "tokenizer_timeout_seconds": TOKENIZER_SECONDS}
    # Prompts long enough not to be tokenized by the server itself.
    asks = [ask for ask in ASKS if len(ask.prompt) > 130]
    async with running_server(**settings) as server, watched(server) as (clients, observer):
        references = await references_of(clients, asks)
        async with load(clients, asks, num_clients=8) as books:
            for number in (signal.SIGKILL, signal.SIGSTOP):
                await wait_until_async(lambda: len(children_of(server, "pagoda.text.worker_process")) == 2)
                for worker in children_of(server, "pagoda.text.worker_process"):
                    os.kill(worker, number)
                so_far = len(books.of("finished"))
                await wait_until_async(lambda so_far=so_far: len(books.of("finished")) > so_far + 30, seconds=150)
        books.check(references)
        note(f"SIGKILL and SIGSTOP of both tokenizer processes: {books.summary}")
        # Nothing but what a lost worker had in its hands.
        assert len(books.of("failed", "refused")) <= 2 * 8
        assert {sight.state for sight in observer.sights} == {"ready"}
        await observer.until_idle()
        workers = children_of(server, "pagoda.text.worker_process")
        engine = server.engine_pid()
        server.send_signal(signal.SIGKILL)
        server.wait()
        await wait_until_async(lambda: not any(map(is_there, [engine, *workers])), seconds=30)
