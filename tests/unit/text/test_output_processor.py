from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.engine.messages import EngineOutput
from pagoda.errors import ErrorKind, QueueFullError, RequestFailedError
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.text.output import GenerationChunk
from pagoda.text.output_processor import RequestMessageState, RequestTextState
from pagoda.text.responses.checkpoint import format_of, make_parser
from pagoda.text.responses.tools import ToolSet
from pagoda.text.tokenizer import Tokenizer
from tests.support.tokenizers import CORPUS, save_tokenizer

with TemporaryDirectory() as directory:
    TOKENIZER = Tokenizer.from_directory(save_tokenizer(Path(directory), "byte_level_bpe"))
PROMPT = TOKENIZER.encode("Once upon a time")
EOS = TOKENIZER.eos_token_id


def state_of(**sampling: object) -> RequestTextState:
    return RequestTextState(TOKENIZER, PROMPT, SamplingParams(**sampling))


def run(
    state: RequestTextState, token_ids: list[int], at_once: int = 1, reason: FinishReason = FinishReason.LENGTH
) -> list[GenerationChunk]:
    """Feed the tokens as an engine would, until the state has had enough."""
    chunks = []
    for start in range(0, len(token_ids), at_once):
        some = token_ids[start : start + at_once]
        is_last = start + at_once >= len(token_ids)
        output = EngineOutput(request_id="r", new_token_ids=some, finish_reason=reason if is_last else None)
        chunks.append(state.process(output))
        if state.finished:
            break
    return chunks


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from(CORPUS),
    stop=st.lists(st.sampled_from(["roofs", "e quick", "京の", "🙂🙃", ". ", "in", "1234", "no such"]), max_size=3),
    include=st.booleans(),
    at_once=st.integers(1, 7),
    min_tokens=st.integers(0, 25),
)
def test_text_is_cut_at_the_first_stop_string_that_the_tokens_complete(text, stop, include, at_once, min_tokens):
    ids = TOKENIZER.encode(text)
    state = state_of(stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens)
    chunks = run(state, ids, at_once)

    # Naively: after each token beyond min_tokens, look for the stop string that ends first in what it added.
    expected_text, expected_ids, matched = TOKENIZER.decode(ids), ids, None
    for count in range(1, len(ids) + 1):
        before, after = (TOKENIZER.decode(ids[:n]).rstrip("\ufffd") for n in (count - 1, count))
        ends = [
            (end, -len(s), s)
            for s in stop
            for end in range(len(before) + 1, len(after) + 1)
            if count > min_tokens and after[:end].endswith(s)
        ]
        if ends:
            end, _, matched = min(ends)
            expected_text, expected_ids = after[: end if include else end - len(matched)], ids[:count]
            break
    assert text_of(chunks) == expected_text
    assert ids_of(chunks) == expected_ids
    assert chunks[-1].finish_reason is (FinishReason.LENGTH if matched is None else FinishReason.STOP)
    assert chunks[-1].stop_reason == matched
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert state.finished


def test_engine_must_be_told_of_a_stop_string_unless_it_had_ended_already():
    ids = TOKENIZER.encode("one two three")
    early, late = state_of(stop=("two",)), state_of(stop=("three",))
    run(early, ids)
    run(late, ids, at_once=len(ids))
    assert early.must_abort
    assert not late.must_abort


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_token_that_ended_the_request_is_in_its_ids_and_not_in_its_text(skip_special_tokens):
    ids = [*TOKENIZER.encode("the end"), EOS]
    chunks = run(state_of(skip_special_tokens=skip_special_tokens), ids, reason=FinishReason.STOP)
    assert text_of(chunks) == "the end"
    assert ids_of(chunks) == ids


def test_token_that_ended_the_request_is_in_its_text_when_that_was_asked_for():
    ids = [*TOKENIZER.encode("the end"), EOS]
    state = state_of(skip_special_tokens=False, include_stop_str_in_output=True)
    assert text_of(run(state, ids, reason=FinishReason.STOP)) == "the end<|im_end|>"


@pytest.mark.parametrize("at_once", [1, 100])
@pytest.mark.parametrize("is_message", [False, True])
def test_token_that_completed_a_constrained_answer_is_in_its_text(is_message, at_once):
    state = state_of()
    if is_message:
        parser = make_parser(format_of("hermes", "think"), ToolSet({"f": {}}))
        state = RequestMessageState(TOKENIZER, PROMPT, SamplingParams(), parser)
    ids = TOKENIZER.encode('{"age": 34}')
    text = ""
    for start in range(0, len(ids), at_once):
        some = ids[start : start + at_once]
        is_last = start + at_once >= len(ids)
        reason = FinishReason.STOP if is_last else None
        output = EngineOutput(request_id="r", new_token_ids=some, finish_reason=reason, is_complete=is_last)
        chunk = state.process(output)
        text += "".join(delta.text for delta in chunk.all_deltas())
    assert text == '{"age": 34}'


def test_unfinished_character_is_held_back_and_ends_as_a_replacement():
    ids = TOKENIZER.encode("塔", add_special_tokens=False)[:-1]
    chunks = run(state_of(), [*TOKENIZER.encode("a"), *ids])
    assert [chunk.text for chunk in chunks[:-1]] == ["a"] + [""] * (len(chunks) - 2)
    assert chunks[-1].text == "\ufffd"


def test_first_chunk_alone_tells_of_the_prompt():
    state = RequestTextState(TOKENIZER, PROMPT, SamplingParams(), index=2, echo="Once upon a time")
    outputs = [
        EngineOutput(
            request_id="r",
            new_token_ids=[token_id],
            num_cached_tokens=3,
            scheduled_time=1.5,
            prompt_logprobs=[None, TokenLogprobs([PROMPT[1], 65], [-0.5, -0.25], 2)] if position == 0 else None,
        )
        for position, token_id in enumerate(TOKENIZER.encode(" pagoda, nice"))
    ]
    first, *others = [state.process(output) for output in outputs]
    assert first.text.startswith("Once upon a time ")
    assert (first.index, first.num_prompt_tokens, first.prompt_token_ids) == (2, len(PROMPT), PROMPT)
    assert (first.num_cached_tokens, first.scheduled_time) == (3, 1.5)
    assert first.prompt_logprobs[0] is None
    assert first.prompt_logprobs[1].chosen.rank == 2
    assert first.prompt_logprobs[1].top[0].token_id == 65
    assert others
    for chunk in others:
        assert (chunk.num_prompt_tokens, chunk.prompt_token_ids, chunk.prompt_logprobs) == (None, None, None)
        assert (chunk.num_cached_tokens, chunk.scheduled_time) == (None, None)


def test_logprobs_are_cut_with_the_tokens_and_their_bytes_join_to_characters():
    ids = TOKENIZER.encode("京 stop after")
    logprobs = [TokenLogprobs([token_id, 5], [-1.0, -2.0], 1) for token_id in ids]
    state = state_of(stop=("stop",), logprobs=1)
    chunk = state.process(EngineOutput(request_id="r", new_token_ids=ids, logprobs=logprobs))
    assert len(chunk.logprobs) == len(chunk.token_ids) < len(ids)
    data = bytes(byte for position in chunk.logprobs for byte in position.chosen.bytes)
    assert data.decode() == "京 stop"
    assert chunk.logprobs[0].chosen.token == "\ufffd"  # a part of a character is shown as what it is
    assert [candidate.token_id for candidate in chunk.logprobs[0].top] == [5]
    assert chunk.logprobs[0].top[0].rank == 1


def test_error_of_the_engine_is_raised_as_what_it_is():
    state = state_of()
    with pytest.raises(QueueFullError, match="no room"):
        state.process(
            EngineOutput(
                request_id="r", finish_reason=FinishReason.ERROR, error_kind=ErrorKind.QUEUE_FULL, error="no room"
            )
        )
    assert state.finished
    assert not state.must_abort


def test_failure_to_make_text_fails_the_request_and_tells_the_engine():
    state = state_of()
    with pytest.raises(RequestFailedError, match="could not be turned into text"):
        state.process(EngineOutput(request_id="r", new_token_ids=["not an id"]))  # type: ignore[list-item]
    assert state.finished
    assert state.must_abort


def test_aborted_request_gives_out_what_it_had():
    chunks = run(state_of(stop=("dog and",)), TOKENIZER.encode("a lazy dog"), reason=FinishReason.ABORT)
    assert text_of(chunks) == "a lazy dog"
    assert chunks[-1].finish_reason is FinishReason.ABORT
