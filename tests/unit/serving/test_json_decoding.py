"""JSON of any form is decoded as orjson decodes it, or refused for what it would cost; long lists of ids are arrays."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.errors import ContextLengthError, InvalidRequestError, PagodaError, RequestTooLargeError
from pagoda.request import TokenIds
from pagoda.serving import json_decoding
from pagoda.serving.json_decoding import LARGE_BYTES, JsonLimits, loads

TEXTS = st.text(alphabet='ab"\\é,[]{}😀\n:', max_size=40)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=90)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(0, 300), st.floats(allow_nan=False, allow_infinity=False), TEXTS, IDS
    ),
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(TEXTS, children, max_size=3)),
    max_leaves=8,
)


@pytest.fixture(params=[7, 64, 2**16], ids=lambda size: f"pieces of {size}")
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every body is large, every long list is cut out, and what is looked at at once ends anywhere."""
    monkeypatch.setattr(json_decoding, "LARGE_BYTES", 0)
    monkeypatch.setattr(json_decoding, "FEW_NUMBERS", 0)
    monkeypatch.setattr(json_decoding, "_PIECE", request.param)
    monkeypatch.setattr(json_decoding, "_RUN_PIECE", max(32, request.param))


def plain(value: Any) -> Any:
    if isinstance(value, TokenIds):
        return value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


@pytest.mark.usefixtures("small_pieces")
def test_a_large_body_is_what_orjson_makes_of_it() -> None:
    @given(value=VALUES, is_ascii=st.booleans(), spaces=st.booleans())
    def check(value: Any, is_ascii: bool, spaces: bool) -> None:
        separators = (" , ", " : ") if spaces else (",", ":")
        body = json.dumps({"a": value}, ensure_ascii=is_ascii, separators=separators).encode("utf-8", "replace")
        assert plain(loads(body)) == orjson.loads(body)

    check()


@pytest.mark.usefixtures("small_pieces")
def test_what_is_no_json_is_an_error_of_the_client_and_no_fault() -> None:
    @given(body=st.one_of(st.binary(max_size=300), st.text(alphabet='[]{}",\\:1 e-.', max_size=600).map(str.encode)))
    def check(body: bytes) -> None:
        with suppress(PagodaError):
            try:
                expected = orjson.loads(body)
            except orjson.JSONDecodeError:
                with pytest.raises(orjson.JSONDecodeError):
                    loads(body)
            else:
                assert plain(loads(body)) == expected

    check()


def long_list(element: str, size: int = 4 * LARGE_BYTES) -> bytes:
    return ('{"x":[' + ",".join([element] * (size // (len(element) + 1))) + "]}").encode()


def test_a_long_list_of_ids_takes_four_bytes_each() -> None:
    ids = loads(long_list("257"))["x"]
    assert isinstance(ids, TokenIds)
    assert ids.array.nbytes == 4 * len(ids)
    assert set(ids.tolist()) == {257}


@pytest.mark.parametrize("element", ["-1", "1.5", "null", "true", str(2**31)])
def test_a_long_list_of_other_numbers_is_refused(element: str) -> None:
    with pytest.raises(InvalidRequestError, match="not all token ids"):
        loads(long_list(element))


@pytest.mark.parametrize(
    ("element", "words"),
    [
        ("[]", "lists and objects"),
        ("{}", "lists and objects"),
        ('""', "values"),
        ('"ab"', "they take"),
        ('{"role":"user"}', "lists and objects"),
    ],
)
def test_a_body_that_would_take_many_times_its_size_is_refused_before_it_is_decoded(element: str, words: str) -> None:
    with pytest.raises(RequestTooLargeError, match=words):
        loads(long_list(element, 2**20))


def test_what_clients_send_is_not_refused() -> None:
    conversation = [{"role": "user", "content": "Tell me about the sea. " * 5}] * 4000
    assert loads(json.dumps({"messages": conversation}).encode())["messages"] == conversation
    batch = [[50_000 + number for number in range(2000)]] * 512
    prompts = loads(json.dumps({"prompt": batch}).encode(), JsonLimits(10**5, 512 * 2048))["prompt"]
    assert [prompt.tolist() for prompt in prompts] == batch
    schema = {"enum": [number / 2 for number in range(2000)]}
    assert loads(json.dumps({"tools": [schema], "x": "y" * LARGE_BYTES}).encode())["tools"] == [schema]


def test_more_than_the_model_can_need_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at most 1000 are allowed"):
        loads(long_list("257"), JsonLimits(max_token_ids=1000))
    for character, width in (("a", 1), ("é", 2), ("😀", 4), ("\\u00e9", 6)):
        text = character * (2 * LARGE_BYTES // width)
        with pytest.raises(ContextLengthError, match="a string of at least"):
            loads(f'{{"x":"{text}"}}'.encode(), JsonLimits(max_characters=1000))
    text = "\\ud83d\\ude00" * LARGE_BYTES
    assert loads(f'{{"x":"{text}"}}'.encode(), JsonLimits(max_characters=LARGE_BYTES))["x"] == "😀" * LARGE_BYTES
