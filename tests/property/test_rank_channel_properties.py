"""The connection to a rank: whatever bytes come, it delivers messages or its end, and it never waits for a reader."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.distributed.rank_channel import CODEC, ChannelEnded, RankChannel
from pagoda.distributed.rank_messages import (
    Heartbeat,
    LoadProgress,
    PhaseDone,
    RankHeartbeat,
    RunStep,
    StepDone,
    StepFailed,
)
from pagoda.framing import HEADER, MAX_PAYLOAD_BYTES
from pagoda.request import EngineRequest
from pagoda.sampling.output import TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NewBlocks, NewRequest, SampledTokensUpdate, StepPlan, StepResult

SECONDS = 20.0
NUMBERS = st.integers(0, 2**31)

SAMPLING = SamplingParams(temperature=0.5, logit_bias={3: 1.5}, stop=("a",), seed=7)
SPEC = EngineRequest(request_id="a", params=SAMPLING, prompt_token_ids=[1], max_tokens=1, eos_token_ids=(2,))
NEW_REQUEST = NewRequest(0, SPEC, [], [[1]], 0)
PLANS = st.builds(
    StepPlan,
    step_id=NUMBERS,
    released_req_indices=st.lists(NUMBERS, max_size=3),
    new_requests=st.lists(
        st.builds(
            NewRequest,
            req_index=NUMBERS,
            spec=st.builds(
                EngineRequest,
                request_id=st.text(max_size=8),
                params=st.just(SAMPLING),
                cache_keys=st.sampled_from([(), ("salt=x", "y")]),
                prompt_token_ids=st.lists(NUMBERS, max_size=5),
                max_tokens=NUMBERS,
                eos_token_ids=st.just((1, 2)),
            ),
            output_token_ids=st.lists(NUMBERS, max_size=5),
            block_ids=st.lists(st.lists(NUMBERS, max_size=3), max_size=2),
            num_computed_tokens=NUMBERS,
        ),
        max_size=2,
    ),
    request_ids=st.lists(st.text(max_size=8), max_size=3),
    new_blocks=st.lists(
        st.builds(NewBlocks, NUMBERS, NUMBERS, NUMBERS, block_ids=st.lists(NUMBERS, max_size=3)), max_size=3
    ),
    samples=st.lists(st.booleans(), max_size=3),
)
RESULTS = st.builds(
    StepResult,
    step_id=NUMBERS,
    sampled_token_ids=st.lists(st.lists(NUMBERS, max_size=3), max_size=4),
    logprobs=st.dictionaries(NUMBERS, st.just([TokenLogprobs([5, 6], [-0.5, -1.5], 1)]), max_size=2),
    errors=st.dictionaries(NUMBERS, st.text(max_size=20), max_size=2),
)
MESSAGES = st.one_of(
    st.builds(RunStep, PLANS, st.builds(SampledTokensUpdate, req_indices=st.lists(NUMBERS, max_size=3))),
    st.builds(StepDone, RESULTS),
    st.builds(PhaseDone, st.text(max_size=10)),
    st.builds(LoadProgress, NUMBERS, NUMBERS),
    st.builds(
        StepFailed,
        step_id=NUMBERS,
        error=st.text(max_size=30),
        is_out_of_memory=st.booleans(),
        is_communication=st.booleans(),
        is_out_of_step=st.booleans(),
    ),
)


@contextmanager
def listening() -> Iterator[tuple[socket.socket, queue.SimpleQueue[Any], RankChannel]]:
    """A channel, the raw socket at its other end, and what it delivers."""
    theirs, ours = socket.socketpair()
    delivered: queue.SimpleQueue[Any] = queue.SimpleQueue()
    channel = RankChannel(ours)
    channel.start(delivered.put)
    with theirs:
        yield theirs, delivered, channel
        channel.close()


def all_delivered(delivered: queue.SimpleQueue[Any]) -> list[Any]:
    found = []
    while not isinstance(message := delivered.get(timeout=SECONDS), ChannelEnded):
        found.append(message)
    return [*found, message]


@given(st.lists(MESSAGES, max_size=8), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(messages: list[Any], size: int) -> None:
    stream = b"".join(map(CODEC.encode, messages))
    with listening() as (theirs, delivered, _):
        for begin in range(0, len(stream), size):
            theirs.sendall(stream[begin : begin + size])
        theirs.shutdown(socket.SHUT_WR)
        *found, end = all_delivered(delivered)
    assert found == messages
    assert end == ChannelEnded("the connection was closed")


@given(st.lists(MESSAGES, max_size=3), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_bytes_that_mean_nothing_end_the_channel_and_nothing_else(messages: list[Any], noise: bytes) -> None:
    with listening() as (theirs, delivered, _):
        theirs.sendall(b"".join(map(CODEC.encode, messages)) + noise)
        theirs.shutdown(socket.SHUT_WR)
        *found, end = all_delivered(delivered)
    assert found[: len(messages)] == messages  # noise may happen to be a message
    assert isinstance(end, ChannelEnded)


@given(MESSAGES, st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_a_message_or_the_end_but_never_an_exception(message: Any, data: st.DataObject) -> None:
    frame = bytearray(CODEC.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with listening() as (theirs, delivered, _):
        theirs.sendall(frame)
        theirs.shutdown(socket.SHUT_WR)
        *found, end = all_delivered(delivered)
    assert len(found) <= len(frame)
    assert isinstance(end, ChannelEnded)


@pytest.mark.parametrize(
    ("message", "part", "wrong"),
    [
        (PhaseDone("weights"), b"weights", b"weigh\xe1s"),
        (RunStep(StepPlan(1, new_requests=[NEW_REQUEST]), SampledTokensUpdate()), b"\xa1n\x01", b"\xa1n\x00"),
    ],
    ids=["text that is no UTF-8", "parameters that cannot be"],
)
def test_content_that_cannot_be_meant_ends_the_channel(message: Any, part: bytes, wrong: bytes) -> None:
    frame = CODEC.encode(message)
    assert frame.count(part) == 1
    with listening() as (theirs, delivered, _):
        theirs.sendall(frame.replace(part, wrong))
        (end,) = all_delivered(delivered)
    assert f"invalid {type(message).__name__} message" in end.reason


def test_a_length_beyond_all_bounds_is_refused_before_anything_is_read() -> None:
    with listening() as (theirs, delivered, _):
        theirs.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 0))
        (end,) = all_delivered(delivered)
    assert "invalid frame header" in end.reason


def test_heartbeats_are_noted_and_not_delivered() -> None:
    with listening() as (theirs, delivered, channel):
        heard = channel.last_received
        theirs.sendall(CODEC.encode(Heartbeat()) + CODEC.encode(RankHeartbeat(3, 4)))
        theirs.shutdown(socket.SHUT_WR)
        assert all_delivered(delivered) == [ChannelEnded("the connection was closed")]
        assert channel.last_received > heard
        assert channel.heartbeat == RankHeartbeat(3, 4)


def test_sending_to_a_side_that_reads_nothing_does_not_wait_and_loses_nothing() -> None:
    plans = [RunStep(StepPlan(step_id=number, req_indices=list(range(20_000)))) for number in range(40)]
    with listening() as (theirs, _, channel):
        for plan in plans:
            channel.send(plan)  # it would wait for ever
        channel.send_heartbeat(Heartbeat())  # left out: what is unsent will be a sign of life
        other: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reader = RankChannel(theirs.dup())
        reader.start(other.put)
        assert [other.get(timeout=SECONDS) for _ in plans] == plans
        reader.close()


def test_closing_gives_what_is_unsent_its_time() -> None:
    theirs, ours = socket.socketpair()
    delivered: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender, reader = RankChannel(ours), RankChannel(theirs)
    sender.start(lambda _: None)
    message = RunStep(StepPlan(step_id=1, req_indices=list(range(500_000))))
    sender.send(message)
    reader.start(delivered.put)
    sender.close(SECONDS)
    sender.close()
    sender.send(message)  # dropped
    assert all_delivered(delivered) == [message, ChannelEnded("the connection was closed")]
    reader.close()
