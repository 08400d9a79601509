"""Faults on purpose in a whole server under load: each stays with the requests it belongs to."""

from __future__ import annotations

import asyncio

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
from tests.support.load import Ask, Books, load, run_all
from tests.support.notes import Note
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


async def test_a_fault_of_one_request_at_any_point_ends_that_request_alone(note: Note) -> None:
    # The doors name their requests, so a fault can be meant for some of them: completions, infer, chat.
    faults = {
        "completions": "prepare@cmpl=raise",
        "infer": "sample@infer#20=raise",
        "chat": "detokenize@chatcmpl=raise",
    }
    good = asks_of(("generate", "generate_stream", "grpc", "grpc_stream"))
    with ServerProcess(**SETTINGS, fault_injection=",".join(faults.values())) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            references = await references_of(clients, good)
            async with load(clients, good, num_clients=8) as books:
                wrong = Books()
                for _ in range(5):
                    asked = await run_all(clients, asks_of(tuple(faults), lengths=(12,)))
                    wrong.answers += asked.answers
            books.check(references)
            assert books.count().keys() == {"finished"}
            failed = wrong.of("failed", "refused")
            note(f"{', '.join(faults.values())}: {wrong.summary}; all others: {books.summary}")
            assert {answer.ask.door for answer in failed} == set(faults)
            assert not [
                answer for answer in failed if "injected fault" not in answer.error and "500" not in answer.error
            ]
            by_door = {door: [answer.end for answer in wrong.answers if answer.ask.door == door] for door in faults}
            assert "finished" not in by_door["completions"] + by_door["chat"]
            assert by_door["infer"].count("refused") == 1  # the twentieth token of all infer requests, and no other
            await observer.until_idle()
            assert (await observer.metrics())["engine_restarts_total"] == 0
            assert [sight.state for sight in observer.sights if sight.state != "ready"] == []


async def test_a_step_that_does_not_fit_costs_nobody_anything_and_one_that_fails_only_its_own_requests(
    note: Note,
) -> None:
    asks = asks_of(lengths=(12, 60))
    with ServerProcess(**SETTINGS, fault_injection="step#900=oom,step#905=oom,step#1600=raise") as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            references = await references_of(clients, asks)
            async with load(clients, asks, num_clients=8) as books:
                await wait_until_async(lambda: bool(books.of("failed", "refused")), seconds=400)  # 1600 steps
                so_far = len(books.answers)
                await wait_until_async(lambda: len(books.answers) > so_far + 30)
            books.check(references)
            failed = books.of("failed", "refused")
            note(f"two steps that do not fit, one that fails: {books.summary}")
            assert 1 <= len(failed) <= SETTINGS["max_num_seqs"]
            assert not [answer for answer in failed if answer.is_retriable]  # the same again might fail again
            await observer.until_idle()
            await check_same_answers(clients, asks, references)
            figures = await observer.metrics()
            assert figures["engine_restarts_total"] == 0
            # Degraded from the first step that did not fit until steps had their full size again; and ready all the time.
            assert figures["engine_state_transitions_total[ready,degraded]"] == 1
            assert figures["engine_state_transitions_total[degraded,ready]"] == 1
            assert all(sight.is_ready for sight in observer.sights)


@pytest.mark.parametrize(("fault", "bound"), [("prepare@cmpl=exit", 0.5), ("sample@cmpl=spin", STALL_SECONDS + 1)])
async def test_a_request_that_brings_the_engine_down_does_so_for_a_moment(fault: str, bound: float, note: Note) -> None:
    good = asks_of(("generate", "generate_stream", "infer", "chat", "grpc", "grpc_stream"))
    with ServerProcess(**SETTINGS, fault_injection=fault) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            references = await references_of(clients, good)
            poisoned: list[asyncio.Task] = []
            async with load(clients, good, num_clients=8) as books:
                await wait_until_async(lambda: len(books.answers) > 10)
                recovery = await disturb_and_recover(
                    observer,
                    lambda: poisoned.append(asyncio.create_task(clients.run(Ask("completions", "poison", 5)))),
                    unready_within=bound,
                )
            books.check(references)
            note(f"{recovery}; {books.summary}")
            assert not [answer for answer in books.of("failed", "refused") if not answer.is_retriable]
            assert (await poisoned[0]).end in ("failed", "refused")
            await observer.until_state("ready", seconds=150)
            await observer.until_idle()
            await check_same_answers(clients, good, references)
            # It is replayed once, for others may be the cause.
            assert (await observer.metrics())["engine_restarts_total"] == 2
            assert "was running in 2 engines that failed" in server.log
