"""`logprobs` of completions: offsets into the text, and candidates by their texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.serving.openai.logprobs import CompletionLogprobs
from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.output import PositionLogprobs, TokenLogprob
from pagoda.text.tokenizer import Tokenizer
from tests.support.tokenizers import CORPUS, save_tokenizer

KINDS = ["byte_level_bpe", "byte_fallback_bpe", "unigram_byte_fallback"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory: Path = tmp_path_factory.mktemp("tokenizers")
    return {kind: Tokenizer.from_directory(save_tokenizer(directory / kind, kind)) for kind in KINDS}


def token(tokenizer: Tokenizer, token_id: int, logprob: float = -1.0) -> TokenLogprob:
    data = tokenizer.token_bytes(token_id)
    return TokenLogprob(token_id, data.decode(errors="replace"), list(data), logprob, 1)


def positions(tokenizer: Tokenizer, ids: list[int]) -> list[PositionLogprobs]:
    return [PositionLogprobs(token(tokenizer, token_id), []) for token_id in ids]


def offsets(tokenizer: Tokenizer, ids: list[int], prompt: list[int], *, skip: bool) -> list[int]:
    lists = CompletionLogprobs(tokenizer, skip_special_tokens=skip, as_token_ids=False)
    first, rest = ids[:1], ids[1:]
    found: list[int] = lists.add(positions(tokenizer, first), prompt)["text_offset"]
    return found + (lists.add(positions(tokenizer, rest))["text_offset"] if rest else [])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_each_offset_is_where_the_tokens_text_is(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    skip = data.draw(st.booleans())
    prompt = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=4))
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12)
    of_text = st.sampled_from([line for line in CORPUS if line]).map(lambda text: tokenizer.encode(text)[:40])
    ids = data.draw(st.one_of(some_ids, of_text))
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip)
    text = "".join(map(detokenizer.feed, ids)) + detokenizer.finish()
    found = offsets(tokenizer, ids, prompt, skip=skip)
    assert found == sorted(found)
    assert found[0] <= 4  # a character that the prompt left half stands before it
    assert found[-1] <= len(text)
    for token_id, offset in zip(ids, found, strict=True):
        entry = tokenizer.token(token_id) or ""
        own = tokenizer.token_bytes(token_id).decode(errors="replace")
        if (
            "\ufffd" not in own
            and not entry.startswith("<0x")
            and not (skip and token_id in tokenizer.special_token_ids)
        ):
            # The text begins without the space that its first token has behind a special one that is left out.
            is_first = offset == 0 and text.startswith(own.removeprefix(" "))
            assert is_first or text[offset : offset + len(own)] == own


def test_special_tokens_that_are_left_out_take_no_room(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level_bpe"]
    one, two, special = (tokenizer.encode(text) for text in ("one", " two", "<|im_start|>"))
    ids = one + special + two
    begin = len(one) + len(special)
    assert offsets(tokenizer, ids, [0], skip=True)[begin] == len("one")
    assert offsets(tokenizer, ids, [0], skip=False)[begin] == len("one<|im_start|>")


def test_all_parts_of_a_character_stand_where_it_is(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level_bpe"]
    emoji = tokenizer.encode("🙃")
    assert len(emoji) > 1
    found = offsets(tokenizer, [*tokenizer.encode("a"), *emoji, *tokenizer.encode("b")], [0], skip=True)
    assert found == [0, *[1] * len(emoji), 2]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_of_an_echoed_prompt_are_those_of_its_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = "Once upon a time there was a pagoda"
    ids = tokenizer.encode(prompt)
    lists = CompletionLogprobs(tokenizer, skip_special_tokens=True, as_token_ids=False)
    found = lists.add_prompt(ids, positions(tokenizer, ids[1:]), prompt)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids)
    assert found["token_logprobs"][0] is None
    for token_id, offset in zip(ids, found["text_offset"], strict=True):
        own = tokenizer.token_bytes(token_id).decode(errors="replace")
        if token_id not in tokenizer.special_token_ids and "\ufffd" not in own:
            assert prompt[offset:].startswith(own) or (offset == 0 and own[0] == " ")
    follows = lists.add(positions(tokenizer, tokenizer.encode("x", add_special_tokens=False)[-1:]), ids)
    assert follows["text_offset"] == [len(prompt)]


def test_candidates_that_decode_alike_are_all_there(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level_bpe"]
    halves = [token_id for token_id in range(tokenizer.vocab_size) if token(tokenizer, token_id).token == "\ufffd"][:3]
    assert len(halves) == 3
    position = PositionLogprobs(
        token(tokenizer, halves[2], -3.0), [token(tokenizer, halves[0], -1.0), token(tokenizer, halves[1], -2.0)]
    )
    by_text = CompletionLogprobs(tokenizer, skip_special_tokens=True, as_token_ids=False).add([position], [0])
    assert by_text["top_logprobs"] == [{"\ufffd": -1.0, f"token_id:{halves[1]}": -2.0, f"token_id:{halves[2]}": -3.0}]
    by_id = CompletionLogprobs(tokenizer, skip_special_tokens=True, as_token_ids=True).add([position], [0])
    assert list(by_id["top_logprobs"][0].values()) == [-1.0, -2.0, -3.0]
    assert by_id["tokens"] == [f"token_id:{halves[2]}"]
