"""Frames between client and core: a request that cannot be read, or is refused for its values, fails alone."""

from __future__ import annotations

import msgspec
import pytest

from pagoda.engine import wire
from pagoda.engine.messages import AbortRequests
from pagoda.errors import ErrorKind, RequestFailedError
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams


def read(frame: bytes) -> wire.Message:
    header, payload = frame[: wire.HEADER.size], frame[wire.HEADER.size :]
    assert wire.payload_size(header) == len(payload)
    return wire.decode(header, payload)


def request(**fields) -> EngineRequest:
    values = {"request_id": "r1", "prompt_token_ids": [1, 2], "max_tokens": 3} | fields
    return EngineRequest(params=SamplingParams(logit_bias={5: 1.5}, stop=("a",)), **values)


def test_a_request_survives_the_way() -> None:
    assert read(wire.encode(request(tenant="t", cache_keys=("s",)))) == request(tenant="t", cache_keys=("s",))


@pytest.mark.parametrize("fields", [{"prompt_token_ids": ["x"]}, {"max_tokens": None}])
def test_an_unreadable_request_is_named(fields) -> None:
    with pytest.raises(wire.UnreadableRequestError) as caught:
        read(wire.encode(request(**fields)))
    assert caught.value.request_id == "r1"
    assert isinstance(caught.value.reason, RequestFailedError)


def edited(**fields) -> bytes:
    """The frame of a request, with other fields than its classes would let through."""
    frame = wire.encode(request())
    payload = msgspec.msgpack.encode(msgspec.msgpack.decode(frame[wire.HEADER.size :]) | fields)
    _, kind = wire.HEADER.unpack(frame[: wire.HEADER.size])
    return wire.HEADER.pack(len(payload) + 1, kind) + payload


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"top_p": 7.0}, "top_p must be a number"),
        ({"n": 0}, "n must be an integer"),
        ({"stop": [""]}, "stop must hold"),
    ],
)
def test_a_request_whose_values_are_refused_ends_with_the_sentence_that_refuses_them(params, words: str) -> None:
    with pytest.raises(wire.UnreadableRequestError, match=words) as caught:
        read(edited(params=params))
    assert caught.value.request_id == "r1"
    assert caught.value.reason.kind is ErrorKind.INVALID_REQUEST


@pytest.mark.parametrize("request_id", [None, 3])
def test_a_request_without_an_id_that_can_be_read_is_an_error_of_the_connection(request_id) -> None:
    with pytest.raises(wire.FrameError):
        read(edited(request_id=request_id))


def test_another_unreadable_message_is_an_error_of_the_connection() -> None:
    with pytest.raises(wire.FrameError):
        read(wire.encode(AbortRequests([3])))  # type: ignore[list-item]
