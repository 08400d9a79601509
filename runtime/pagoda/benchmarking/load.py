"""Puts the load of a plan on an endpoint and keeps a record of every request.

An open loop never waits for answers: each conversation is begun at its planned moment, whatever became of those before, and
its latencies count from that moment, not from when this client got around to it. So neither a slow server nor a slow client
can hide in fewer requests (coordinated omission). How late the client was is in the records, and how busy in `ClientLoad`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagoda.benchmarking.arrivals import LoadPlan
from pagoda.benchmarking.endpoints import Endpoint, RequestFailure
from pagoda.benchmarking.prompts import Content
from pagoda.benchmarking.records import RequestRecord
from pagoda.benchmarking.workloads import Conversation

RecordListener = Callable[[RequestRecord], None]
LAG_SAMPLE_SECONDS = 0.02


@dataclass(slots=True)
class ClientLoad:
    """What measuring cost: `lags`: seconds by which the event loop was late for a timer; `cpu_share`: of one core, 0 to 1."""

    lags: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


@dataclass(slots=True)
class LoadResult:
    """All records, in order of their ends, and the client's own load."""

    records: list[RequestRecord]
    client: ClientLoad


async def run_load(
    conversations: Sequence[Conversation], endpoint: Endpoint, plan: LoadPlan, on_record: RecordListener | None = None
) -> LoadResult:
    """Send every conversation as `plan` has it and return once all have ended. Failures are recorded, never raised."""
    records: list[RequestRecord] = []

    def keep(record: RequestRecord) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    client = ClientLoad()
    watch = asyncio.create_task(_watch_loop(client))
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        await _Driver(endpoint, plan, keep).run(conversations)
    finally:
        watch.cancel()
        client.cpu_share = (time.process_time() - cpu_began) / max(1e-9, time.perf_counter() - began)
    return LoadResult(records, client)


class _Driver:
    def __init__(self, endpoint: Endpoint, plan: LoadPlan, keep: RecordListener) -> None:
        self._endpoint = endpoint
        self._plan = plan
        self._keep = keep
        self._slots = None if plan.max_concurrency is None else asyncio.Semaphore(plan.max_concurrency)
        self._loop = asyncio.get_running_loop()

    async def run(self, conversations: Sequence[Conversation]) -> None:
        """Begin each conversation when it is due; in a closed loop that is when a slot is free."""
        began = self._loop.time()
        async with asyncio.TaskGroup() as tasks:
            offsets = self._plan.offsets(len(conversations))
            for number, (conversation, offset) in enumerate(zip(conversations, offsets, strict=True)):
                due = began + offset
                if self._plan.is_open_loop:
                    await asyncio.sleep(max(0.0, due - self._loop.time()))
                    tasks.create_task(self._converse_in_slot(number, conversation, due))
                else:
                    if self._slots is not None:
                        await self._slots.acquire()
                    tasks.create_task(self._converse(number, conversation, self._loop.time()))

    async def _converse_in_slot(self, number: int, conversation: Conversation, due: float) -> None:
        if self._slots is not None:
            await self._slots.acquire()
        await self._converse(number, conversation, due)

    async def _converse(self, number: int, conversation: Conversation, due: float) -> None:
        """Send the turns one after the other, each as soon as the answer before it is there; a failure ends it."""
        history: tuple[Content, ...] = conversation.history
        try:
            for turn_number, turn in enumerate(conversation.turns):
                record = RequestRecord(conversation=number, turn=turn_number, scheduled=due)
                text = await self._ask(record, (*history, turn.content), turn.output_tokens)
                if text is None:
                    return
                history = (*history, turn.content, text)
                due = self._loop.time()
        finally:
            if self._slots is not None:
                self._slots.release()

    async def _ask(self, record: RequestRecord, prompt: tuple[Content, ...], output_tokens: int) -> str | None:
        """One request; the answer's text, or None when it failed."""
        clock = self._loop.time
        record.sent = clock()
        try:
            answer = await self._endpoint.send(prompt, output_tokens, lambda: record.event_times.append(clock()))
        except RequestFailure as failure:
            record.error, record.detail = failure.kind, str(failure)
            return None
        else:
            record.prompt_tokens, record.cached_tokens = answer.prompt_tokens, answer.cached_tokens
            # Where the server gives no count, the pieces of text are the best there is.
            record.output_tokens = answer.pieces if answer.output_tokens is None else answer.output_tokens
            return answer.text
        finally:
            record.ended = clock()
            self._keep(record)


async def _watch_loop(client: ClientLoad) -> None:
    """Note by how much timers are late: time in which an event could have waited to be seen."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SAMPLE_SECONDS
        await asyncio.sleep(LAG_SAMPLE_SECONDS)
        client.lags.append(max(0.0, loop.time() - due))
