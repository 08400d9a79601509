"""Load on an endpoint with known delays, in virtual time: every figure can be said beforehand."""

from __future__ import annotations

import asyncio
import math

import pytest

from pagoda.benchmarking.arrivals import LoadPlan
from pagoda.benchmarking.endpoints import Answer, Endpoint, RequestFailure
from pagoda.benchmarking.load import run_load
from pagoda.benchmarking.metrics import ServiceLevel, summarize
from pagoda.benchmarking.workloads import Conversation, Turn
from pagoda.errors import InvalidRequestError
from tests.support.virtual_time import run_in_virtual_time


class TimedEndpoint(Endpoint):
    """First token after `first` seconds, each further one after `gap`; serves at most `capacity` requests at a time."""

    def __init__(self, first: float = 0.5, gap: float = 0.1, capacity: int | None = None) -> None:
        self.first, self.gap = first, gap
        self.slots = asyncio.Semaphore(capacity or 10**9)
        self.prompts: list[tuple] = []
        self.num_running = self.most_running = 0
        self.fail_on: set[int] = set()

    async def send(self, prompt, output_tokens, on_piece):
        number = len(self.prompts)
        self.prompts.append(prompt)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async with self.slots:
                if number in self.fail_on:
                    raise RequestFailure("HTTP 429", "full")
                await asyncio.sleep(self.first)
                on_piece()
                for _ in range(output_tokens - 1):
                    await asyncio.sleep(self.gap)
                    on_piece()
            return Answer(text=f"answer {number}", pieces=output_tokens, prompt_tokens=3, ended=True)
        finally:
            self.num_running -= 1

    async def close(self):
        """Nothing is open."""


def singles(count: int, output_tokens: int = 5) -> list[Conversation]:
    return [Conversation((Turn(f"prompt {number}", output_tokens),)) for number in range(count)]


def load(conversations, plan: LoadPlan, **endpoint):
    async def work():
        server = TimedEndpoint(**endpoint)
        return await run_load(conversations, server, plan), server

    return run_in_virtual_time(work())


def test_latencies_are_those_of_the_stream():
    result, _ = load(singles(4), LoadPlan(request_rate=1.0))
    figures = summarize(result.records)
    assert figures["ttft_ms"]["p50"] == pytest.approx(500)
    assert figures["itl_ms"]["p99"] == pytest.approx(100)
    assert figures["tpot_ms"]["mean"] == pytest.approx(100)
    assert figures["e2el_ms"]["max"] == pytest.approx(900)
    assert figures["output_tokens"] == 20
    assert figures["prompt_tokens"] == 12


def test_open_loop_sends_on_time_however_slow_the_answers_are():
    plan = LoadPlan(request_rate=10.0, seed=3)
    result, server = load(singles(20), plan, first=1000.0)
    sent = sorted(record.sent for record in result.records)
    assert sent == pytest.approx([sent[0] + offset for offset in plan.offsets(20)])
    assert server.most_running == 20


def test_open_loop_latency_counts_the_wait_in_the_servers_queue():
    result, _ = load(singles(10), LoadPlan(request_rate=100.0, burstiness=1000.0), first=1.0, gap=0.0, capacity=1)
    ttfts = sorted(record.ttft for record in result.records)
    assert ttfts[-1] == pytest.approx(10 - 9 * 0.01, rel=0.01)  # the tenth waits for nine others


def test_open_loop_latency_counts_the_wait_for_the_clients_own_slot():
    plan = LoadPlan(request_rate=100.0, burstiness=1000.0, max_concurrency=1)
    result, server = load(singles(10), plan, first=1.0, gap=0.0)
    assert server.most_running == 1
    assert max(record.ttft for record in result.records) == pytest.approx(10 - 9 * 0.01, rel=0.01)
    assert max(record.lateness for record in result.records) == pytest.approx(9 - 9 * 0.01, rel=0.01)


def test_closed_loop_keeps_as_many_under_way_as_were_asked_for():
    result, server = load(singles(9), LoadPlan(max_concurrency=3), first=0.6, gap=0.1)
    assert server.most_running == 3
    figures = summarize(result.records)
    assert figures["max_concurrent_requests"] == 3
    assert figures["duration_seconds"] == pytest.approx(3 * 1.0)
    assert figures["ttft_ms"]["max"] == pytest.approx(600)  # nobody waited for a slot: there was no time to be on
    assert figures["request_throughput"] == pytest.approx(3.0)


def test_without_rate_and_limit_everything_is_sent_at_once():
    _, server = load(singles(7), LoadPlan())
    assert server.most_running == 7


def test_turns_wait_for_the_answer_and_carry_the_history():
    conversation = Conversation((Turn("one", 2), Turn("two", 2), Turn("three", 2)))
    result, server = load([conversation], LoadPlan(request_rate=5.0))
    assert server.prompts == [
        ("one",),
        ("one", "answer 0", "two"),
        ("one", "answer 0", "two", "answer 1", "three"),
    ]
    assert [record.ttft for record in result.records] == pytest.approx([0.5] * 3)
    assert [record.turn for record in result.records] == [0, 1, 2]


def test_a_failed_turn_ends_its_conversation_and_no_other():
    async def work():
        server = TimedEndpoint()
        server.fail_on = {0}
        conversations = [Conversation((Turn("a", 2), Turn("b", 2))) for _ in range(2)]
        return await run_load(conversations, server, LoadPlan(max_concurrency=1))

    records = run_in_virtual_time(work()).records
    figures = summarize(records)
    assert [(record.conversation, record.turn, record.error) for record in records] == [
        (0, 0, "HTTP 429"),
        (1, 0, None),
        (1, 1, None),
    ]
    assert figures["errors"] == {"HTTP 429": 1}
    assert figures["completed"] == 2


def test_goodput_counts_requests_within_every_limit():
    result, _ = load(singles(10), LoadPlan(request_rate=100.0, burstiness=1000.0), first=1.0, gap=0.0, capacity=1)
    figures = summarize(result.records, ServiceLevel.parse(["ttft:3500", "e2el:100000"]))
    assert figures["goodput"]["share"] == pytest.approx(0.3)
    assert figures["goodput"]["requests_per_second"] == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"request_rate": 0.0}, "request-rate"),
        ({"request_rate": math.nan}, "request-rate"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"burstiness": math.inf}, "burstiness"),
        ({"max_concurrency": 0}, "max-concurrency"),
    ],
)
def test_impossible_load_is_refused_by_name(settings, named):
    with pytest.raises(InvalidRequestError, match=named):
        LoadPlan(**settings)
