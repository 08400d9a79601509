"""What a slow reader of a request costs, and what it still gets."""

from __future__ import annotations

import asyncio
import copy
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.engine.client.output_collector import RequestOutputCollector, merge
from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineDeadError
from pagoda.sampling.output import FinishReason, TokenLogprobs


def output(*token_ids: int, **fields) -> EngineOutput:
    logprobs = [TokenLogprobs([token_id], [-0.5], rank=1) for token_id in token_ids]
    return EngineOutput(request_id="r", new_token_ids=list(token_ids), logprobs=logprobs, **fields)


async def test_a_reader_that_was_away_gets_everything_in_one_piece() -> None:
    collector = RequestOutputCollector()
    collector.put(output(1, prompt_logprobs=[None]))
    collector.put(output(2, 3))
    collector.put(output(4, finish_reason=FinishReason.STOP, stop_reason=4))
    got = await collector.get()
    assert got.new_token_ids == [1, 2, 3, 4]
    assert got.logprobs is not None
    assert [entry.token_ids for entry in got.logprobs] == [[1], [2], [3], [4]]
    assert (got.prompt_logprobs, got.finish_reason, got.stop_reason) == ([None], FinishReason.STOP, 4)


@given(
    st.lists(
        st.builds(
            EngineOutput,
            request_id=st.just("r"),
            new_token_ids=st.lists(st.integers(0, 9), max_size=3),
            logprobs=st.one_of(st.none(), st.just([TokenLogprobs([1], [-0.5], rank=1)])),
            prompt_logprobs=st.one_of(st.none(), st.just([None])),
            num_cached_tokens=st.integers(0, 1),
            scheduled_time=st.sampled_from([None, 1.0]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([None, FinishReason.LENGTH]),
)
def test_what_a_slow_reader_gets_is_all_outputs_merged_and_changes_none_of_them(
    outputs: list[EngineOutput], finish_reason: FinishReason | None
) -> None:
    outputs[-1].finish_reason = finish_reason  # nothing follows an end
    untouched = copy.deepcopy(outputs)
    collector = RequestOutputCollector()
    for one in outputs:
        collector.put(one)
    assert asyncio.run(collector.get()) == functools.reduce(merge, untouched)
    assert outputs == untouched


async def test_a_reader_waits_for_news_and_gets_each_once() -> None:
    collector = RequestOutputCollector()
    collector.put(output(1))
    assert (await collector.get()).new_token_ids == [1]
    waiting = asyncio.create_task(collector.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    collector.put(output(2))
    assert (await waiting).new_token_ids == [2]


async def test_what_came_before_a_loss_is_given_before_the_error() -> None:
    collector = RequestOutputCollector()
    collector.put(output(1))
    collector.fail(EngineDeadError("lost"))
    assert (await collector.get()).new_token_ids == [1]
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            await collector.get()
