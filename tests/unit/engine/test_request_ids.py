"""A client may use one request id twice, at once or one after the other: an output reaches the request that it is of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.health import EngineState
from pagoda.engine.messages import AbortRequests, EngineOutput, EngineOutputs, EngineReady, EngineStats
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams

REQUEST = EngineRequest(request_id="x", params=SamplingParams(), prompt_token_ids=[1], max_tokens=4)


class Core:
    """The client's handle of a core; keeps what is sent to it."""

    is_connected = True
    num_unsent_bytes = 0

    def __init__(self) -> None:
        self.sent: list[EngineRequest | AbortRequests] = []
        self.send = self.sent.append

    @property
    def request_ids(self) -> list[str]:
        return [message.request_id for message in self.sent if isinstance(message, EngineRequest)]


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def client(core: Core) -> ProcessEngineClient:
    client = ProcessEngineClient(PagodaConfig())
    client.ready = EngineReady(
        max_model_len=8, max_num_seqs=4, max_num_batched_tokens=8, num_blocks=8, block_size=4, vocab_size=8
    )
    client.health.transition(EngineState.READY, "started")
    client._child = core  # type: ignore[assignment]
    return client


def deliver(client: ProcessEngineClient, *outputs: EngineOutput) -> None:
    client._deliver(EngineOutputs(list(outputs), EngineStats(), 0.0))


async def started(client: ProcessEngineClient) -> tuple[AsyncGenerator[EngineOutput, None], asyncio.Task[EngineOutput]]:
    """A request that was sent, and the task that waits for its first output."""
    outputs = cast("AsyncGenerator[EngineOutput, None]", client.submit(REQUEST))
    first = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0)
    return outputs, first


async def test_the_end_of_an_aborted_request_does_not_reach_the_next_one_with_its_id(
    client: ProcessEngineClient, core: Core
) -> None:
    outputs, first = await started(client)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await outputs.aclose()
    (aborted,) = core.request_ids
    assert core.sent[1:] == [AbortRequests([aborted])]
    outputs, first = await started(client)
    deliver(client, EngineOutput(request_id=aborted, finish_reason=FinishReason.ABORT))
    deliver(client, EngineOutput(request_id=core.request_ids[1], new_token_ids=[5]))
    assert ((await first).new_token_ids, first.result().finish_reason) == ([5], None)
    await outputs.aclose()


async def test_two_requests_with_one_id_run_at_once(client: ProcessEngineClient, core: Core) -> None:
    (_, first), (_, second) = await started(client), await started(client)
    for token_id, request_id in zip((5, 6), core.request_ids, strict=True):
        assert request_id.startswith("x")  # logs of the core say whose it is
        deliver(
            client, EngineOutput(request_id=request_id, new_token_ids=[token_id], finish_reason=FinishReason.LENGTH)
        )
    assert [(await task).new_token_ids for task in (first, second)] == [[5], [6]]
