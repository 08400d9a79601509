"""How a server ends: told to, hurried, or without an engine that may come back. It never lingers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.chaos import BUSY_SECONDS, SETTINGS, asks_of, watched
from tests.support.load import DOORS, Answer, Ask, Clients
from tests.support.observer import NOT_SERVING, SERVING, Observer
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
PROMPT = "Once upon a time"
# Every step takes 30 ms, so that there is time to do something to a request.
SLOW = "step=sleep:0.03"
ORDERLY_END_SECONDS = 10.0


async def begin(clients: Clients, observer: Observer, asks: list[Ask]) -> list[asyncio.Task[Answer]]:
    """Send requests and wait until all of them run."""
    tasks = [asyncio.create_task(clients.run(ask)) for ask in asks]
    async with asyncio.timeout(60):
        while (await observer.health())["running"] < len(asks):
            await asyncio.sleep(0.02)
    return tasks


async def exit_status(server: ServerProcess, seconds: float = 60.0) -> int:
    """The exit status, once there is one."""
    await wait_until_async(lambda: server.process.poll() is not None, seconds=seconds)
    status = server.process.poll()
    assert status is not None
    return status


async def probe(server: ServerProcess, name: str) -> tuple[int, str]:
    """Exit status and line of `pagoda probe`."""
    command = [sys.executable, "-m", "pagoda.cli.main", "probe", name, f"--http-port={server.port}", "--timeout=20"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_server_that_is_told_to_end_finishes_what_runs_and_refuses_what_is_new() -> None:
    with ServerProcess(**SETTINGS, fault_injection=SLOW, grace_period_seconds=120) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            running = await begin(clients, observer, [Ask(door, PROMPT, 400) for door in DOORS])
            server.send_signal(signal.SIGTERM)
            await observer.until_state("draining")
            async with Clients(server) as new_clients:
                late = await asyncio.gather(*(new_clients.run(Ask(door, PROMPT, 2)) for door in DOORS))
            assert {answer.end for answer in late} == {"refused"}
            assert all(answer.is_retriable for answer in late), late
            (ready, why), (live, _), (startup, _) = await asyncio.gather(
                *(probe(server, name) for name in ("ready", "live", "startup"))
            )
            assert (ready, live, startup) == (1, 0, 0)
            assert "draining" in why
            answers = await asyncio.gather(*running)
            assert {answer.end for answer in answers} == {"finished"}, answers
            assert await exit_status(server) == 0
            assert observer.watched == [SERVING, NOT_SERVING]
            assert all(sight.is_live for sight in observer.sights)
        assert "engine ready -> draining: the server received a stop signal" in server.log
        assert "Traceback" not in server.log


async def test_a_second_signal_and_the_end_of_the_grace_end_what_runs_with_a_retriable_error() -> None:
    for grace, is_hurried in ((300, True), (2, False)):
        with ServerProcess(**SETTINGS, fault_injection=SLOW, grace_period_seconds=grace) as server:
            server.wait_until_ready()
            async with watched(server) as (clients, observer):
                running = await begin(clients, observer, [Ask(door, PROMPT, 450) for door in DOORS])
                server.send_signal(signal.SIGTERM)
                await observer.until_state("draining")
                told = time.monotonic()
                if is_hurried:
                    server.send_signal(signal.SIGTERM)
                assert await exit_status(server) == 0
                assert time.monotonic() - told < ORDERLY_END_SECONDS + BUSY_SECONDS
                answers = await asyncio.gather(*running)
                assert {answer.end for answer in answers} <= {"failed", "refused"}
                assert all(answer.is_retriable for answer in answers), answers


async def test_an_engine_that_is_lost_while_the_server_drains_is_not_started_anew() -> None:
    with ServerProcess(**SETTINGS, fault_injection=SLOW, grace_period_seconds=300) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            running = await begin(clients, observer, [Ask(door, PROMPT, 450) for door in DOORS])
            server.send_signal(signal.SIGTERM)
            await observer.until_state("draining")
            os.kill(server.engine_pid(), signal.SIGKILL)
            assert await exit_status(server) == 1
            answers = await asyncio.gather(*running)
            assert all(answer.is_retriable for answer in answers), answers
        assert "engine draining -> dead" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("settings", [{"on_engine_failure": "exit"}, {"max_engine_restarts": 0}])
async def test_a_server_whose_engine_may_not_come_back_exits_at_once(settings: dict[str, object]) -> None:
    with ServerProcess(**{**SETTINGS, **settings}, fault_injection=SLOW) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            running = await begin(clients, observer, [Ask(door, PROMPT, 450) for door in DOORS])
            os.kill(server.engine_pid(), signal.SIGKILL)
            killed = time.monotonic()
            assert await exit_status(server) == 1
            assert time.monotonic() - killed < ORDERLY_END_SECONDS + BUSY_SECONDS
            answers = await asyncio.gather(*running)
            assert {answer.end for answer in answers} <= {"failed", "refused"}
            assert all(answer.is_retriable for answer in answers), answers
            assert {sight.state for sight in observer.sights} <= {"ready", "dead"}
            assert all(sight.is_live == (sight.state != "dead") for sight in observer.sights)
        assert "SIGKILL" in server.log


async def test_a_signal_between_two_engines_ends_the_server() -> None:
    with ServerProcess(**SETTINGS) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            assert (await clients.run(asks_of()[0])).end == "finished"
            os.kill(server.engine_pid(), signal.SIGKILL)
            await observer.until_state("starting")
            (ready, why), (live, _) = await asyncio.gather(probe(server, "ready"), probe(server, "live"))
            assert (ready, live) == (1, 0) or "200" in why  # it may be back by now
            server.send_signal(signal.SIGTERM)
            assert await exit_status(server) == 0
        assert "Traceback" not in server.log
