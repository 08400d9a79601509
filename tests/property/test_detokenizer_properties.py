from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.tokenizer import Tokenizer
from tests.support.tokenizers import CORPUS, KINDS, save_tokenizer

CONTINUATION_KINDS = [kind for kind in KINDS if kind != "word_piece"]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        return Tokenizer.from_directory(save_tokenizer(Path(directory), kind))


@cache
def byte_like_ids(kind: str) -> list[int]:
    """Ids whose tokens are single bytes or parts of characters: those that make decoding hard."""
    tokenizer = tokenizer_of(kind)
    ids = []
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        if data.decode(errors="ignore").encode() != data or (tokenizer.token(token_id) or "").startswith("<0x"):
            ids.append(token_id)
    return ids or [0]


@st.composite
def ids_of(draw, kind: str) -> list[int]:
    """Any ids, ids of text, and both mixed; some that no token has."""
    tokenizer = tokenizer_of(kind)
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    text_ids = st.one_of(st.sampled_from(CORPUS), st.text(max_size=12)).map(tokenizer.encode)
    pieces = st.one_of(
        st.lists(any_id, max_size=8), text_ids, st.lists(st.sampled_from(byte_like_ids(kind)), max_size=8)
    )
    return [token_id for piece in draw(st.lists(pieces, max_size=5)) for token_id in piece]


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.feed(token_id) for token_id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_streamed_pieces_join_to_the_text_decoded_at_once(kind, data, skip_special_tokens):
    ids = data.draw(ids_of(kind))
    tokenizer = tokenizer_of(kind)
    pieces = stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_are_those_of_a_stream_that_takes_no_short_cut(kind, data):
    ids = data.draw(ids_of(kind))
    tokenizer = tokenizer_of(kind)
    decoder = tokenizer.decoder_plan.stream()
    tokens = [tokenizer.token(token_id) for token_id in ids]
    expected = [decoder.feed([] if token is None else [token]) for token in tokens] + [decoder.finish()]
    assert stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), ids) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_no_piece_of_whole_text_has_a_part_of_a_character(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    pieces = stream(IncrementalDetokenizer(tokenizer), ids)
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


@pytest.mark.parametrize("kind", CONTINUATION_KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_text_after_a_prompt_is_what_the_whole_has_more_than_the_prompt(kind, data, skip_special_tokens):
    tokenizer = tokenizer_of(kind)
    prompt = data.draw(st.sampled_from(CORPUS).map(lambda text: tokenizer.encode(text)[:20]))
    prompt += tokenizer.encode("end", add_special_tokens=False)
    ids = data.draw(ids_of(kind))
    pieces = stream(
        IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip_special_tokens), ids
    )
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) == whole[len(tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)) :]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in byte_like_ids("byte_fallback_bpe")}
    return [by_bytes[bytes([byte])] for byte in data]


def test_character_that_the_prompt_began_is_completed():
    tokenizer = tokenizer_of("byte_fallback_bpe")
    first, *rest = byte_ids(tokenizer, "塔".encode())
    prompt = [*tokenizer.encode("tower"), first]
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt), rest)) == "塔"


def test_bytes_that_belong_to_the_prompt_are_not_given_out_again():
    tokenizer = tokenizer_of("byte_fallback_bpe")
    prompt = [*tokenizer.encode("tower"), *byte_ids(tokenizer, "🙂".encode())]
    following = tokenizer.encode("x the", add_special_tokens=False)
    text = "".join(stream(IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt), following))
    assert text == " x the"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_late_in_a_long_text_costs_no_more_than_an_early_one(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False)
    # Unfinished and invalid bytes without end are what makes decoding from a window slow.
    stubborn = [byte_like_ids(kind)[-1]] * 40_000
    for repeated in (ids * (40_000 // len(ids)), stubborn):
        detokenizer = IncrementalDetokenizer(tokenizer)
        started = time.process_time()
        for token_id in repeated:
            detokenizer.feed(token_id)
        detokenizer.finish()
        assert time.process_time() - started < 3.0  # decoding again from the start would take minutes
