"""Frames between client and core: what cannot be read is blamed on the one request it is about."""

from __future__ import annotations

import pytest

from pagoda.engine import wire
from pagoda.engine.messages import AbortRequests
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


def test_another_unreadable_message_is_an_error_of_the_connection() -> None:
    with pytest.raises(wire.FrameError):
        read(wire.encode(AbortRequests([3])))  # type: ignore[list-item]
