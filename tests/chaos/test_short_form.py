"""Chaos in short, for every run of the tests; the long form is `make test-chaos`.

One server lives through everything, in this order: clients leave, a full queue, a killed engine, a stopped engine; then the
server itself is killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.support.chaos import (
    SETTINGS,
    STALL_SECONDS,
    asks_of,
    check_same_answers,
    disturb_and_recover,
    references_of,
    watched,
)
from tests.support.load import load, run_all
from tests.support.notes import Note
from tests.support.observer import is_there
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

ASKS = asks_of()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(**SETTINGS) as running:
        running.wait_until_ready()
        yield running


async def test_nobody_notices_when_others_leave_when_the_queue_is_full_or_when_the_engine_is_lost(
    server: ServerProcess, note: Note
) -> None:
    async with watched(server) as (clients, observer):
        references = await references_of(clients, ASKS)

        async with load(clients, ASKS, num_clients=16, drop=0.3) as leaving:
            await asyncio.sleep(3)
        leaving.check(references)
        assert leaving.count().keys() == {"finished", "left"}
        note(f"clients that leave: {leaving.summary}")

        crowd = random.Random(1).choices(asks_of(lengths=(60,)), k=160)
        crowded = await run_all(clients, crowd)
        crowded.check(references)
        assert crowded.count().keys() == {"finished", "refused"}
        note(f"a full queue: {crowded.summary}")
        assert all(answer.is_retriable for answer in crowded.of("refused"))
        await observer.until_idle()

        for number in (signal.SIGKILL, signal.SIGSTOP):
            bound = 0.5 if number is signal.SIGKILL else STALL_SECONDS + 1
            async with load(clients, ASKS, num_clients=16, seed=number) as books:
                await wait_until_async(lambda books=books: len(books.answers) > 16)
                recovery = await disturb_and_recover(
                    observer, lambda number=number: os.kill(server.engine_pid(), number), unready_within=bound
                )
                num_before = len(books.answers)
                await wait_until_async(lambda books=books, so_far=num_before: len(books.answers) > so_far + 30)
            books.check(references)
            note(f"{signal.Signals(number).name} of the engine: {recovery}; {books.summary}")
            # Those in the engine go on in the next one; those that came meanwhile are told to come back.
            assert not books.of("failed")
            assert all(answer.is_retriable for answer in books.of("refused"))
            await observer.until_idle()
            await check_same_answers(clients, ASKS, references)

        figures = await observer.metrics()
        # No more than the two on purpose: an engine that found a leak when it was idle would have gone down by itself.
        assert figures["engine_restarts_total"] == figures["engine_state_transitions_total[ready,starting]"] == 2
        assert "Thread 0x" in server.log  # the stacks of the stopped engine
        assert "Traceback" not in server.log


async def test_an_engine_does_not_outlive_its_server_not_even_a_stopped_one(server: ServerProcess) -> None:
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    server.send_signal(signal.SIGKILL)
    server.wait()
    await wait_until_async(lambda: not is_there(engine))
