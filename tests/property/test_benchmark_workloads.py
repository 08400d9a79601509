"""Workloads: lengths, what prompts share, and that a seed makes them."""

from __future__ import annotations

import json
import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.benchmarking.arrivals import LoadPlan
from pagoda.benchmarking.prompts import TokenIdSource, WordSource, plain_token_ids
from pagoda.benchmarking.text_files import read_workload
from pagoda.benchmarking.workloads import (
    LengthRange,
    check_fits,
    multi_turn_conversations,
    random_prompts,
    shared_prefix_prompts,
)
from pagoda.errors import InvalidRequestError
from pagoda.text.tokenizer import Tokenizer
from tests.support.checkpoints import shared_checkpoint

IDS = TokenIdSource(range(100, 600))
ranges = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: LengthRange(pair[0], pair[0] + pair[1]))
counts = st.integers(1, 30)
seeds = st.integers(0, 2**32)


@settings(max_examples=40, deadline=None)
@given(counts, ranges, ranges, seeds)
def test_random_prompts_have_the_lengths_asked_for_and_come_from_the_seed(count, inputs, outputs, seed):
    made = random_prompts(IDS, count, inputs, outputs, seed)
    assert made == random_prompts(IDS, count, inputs, outputs, seed)
    assert len(made) == count
    for conversation in made:
        (turn,) = conversation.turns
        assert inputs.low <= len(turn.content) <= inputs.high
        assert outputs.low <= turn.output_tokens <= outputs.high
        assert all(100 <= token_id < 600 for token_id in turn.content)


@settings(max_examples=40, deadline=None)
@given(counts, st.data(), seeds)
def test_shared_prefixes_are_shared_evenly_and_suffixes_are_not(count, data, seed):
    num_prefixes = data.draw(st.integers(1, count))
    made = shared_prefix_prompts(
        IDS, count, num_prefixes, LengthRange(32, 32), LengthRange(24, 24), LengthRange(5, 5), seed
    )
    prompts = [conversation.turns[0].content for conversation in made]
    by_prefix = {prefix: sum(prompt[:32] == prefix for prompt in prompts) for prefix in {p[:32] for p in prompts}}
    assert len(by_prefix) == num_prefixes
    assert max(by_prefix.values()) - min(by_prefix.values()) <= 1
    assert len({prompt[32:] for prompt in prompts}) == count


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 5), st.integers(0, 3), seeds)
def test_conversations_have_the_turns_asked_for(count, low, more, seed):
    made = multi_turn_conversations(
        IDS, count, LengthRange(low, low + more), LengthRange(4, 8), LengthRange(2, 2), seed
    )
    assert len(made) == count
    assert all(low <= len(conversation.turns) <= low + more for conversation in made)


def test_another_seed_makes_another_workload():
    lengths = LengthRange(20, 20)
    assert random_prompts(IDS, 3, lengths, lengths, 1) != random_prompts(IDS, 3, lengths, lengths, 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), seeds)
def test_words_are_cut_to_the_number_of_tokens_that_the_tokenizer_counts(num_tokens, seed):
    tokenizer = Tokenizer.from_directory(shared_checkpoint())
    text = WordSource(tokenizer).make(random.Random(seed), num_tokens)
    counted = len(tokenizer.encode(text, add_special_tokens=False))
    assert abs(counted - num_tokens) <= max(8, num_tokens // 5)  # one word at most is over or missing
    assert len(WordSource().make(random.Random(seed), num_tokens).split()) == num_tokens


def test_plain_token_ids_leave_special_tokens_out():
    tokenizer = Tokenizer.from_directory(shared_checkpoint())
    ids = plain_token_ids(tokenizer)
    assert not tokenizer.special_token_ids & set(ids)
    assert len(ids) + len(tokenizer.special_token_ids) == tokenizer.vocab_size


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "5:3", "1:2:3", "1.5", ":4"])
def test_impossible_lengths_are_refused(text):
    with pytest.raises(InvalidRequestError):
        LengthRange.parse(text)


def test_lengths_are_a_number_or_a_range():
    assert LengthRange.parse("7") == LengthRange(7, 7)
    assert LengthRange.parse("7:9") == LengthRange(7, 9)


def test_a_conversation_that_cannot_fit_is_refused_with_both_numbers():
    made = random_prompts(IDS, 1, LengthRange(90, 90), LengthRange(20, 20), 0)
    check_fits(made, 110)
    with pytest.raises(InvalidRequestError, match=r"110.*109"):
        check_fits(made, 109)


def test_more_prefixes_than_prompts_are_refused():
    one = LengthRange(1, 1)
    with pytest.raises(InvalidRequestError, match="3 prefixes for 2 prompts"):
        shared_prefix_prompts(IDS, 2, 3, one, one, one, 0)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 50), st.sampled_from([0.3, 1.0, 4.0]), seeds)
def test_arrivals_have_the_rate_and_burstiness_asked_for(rate, burstiness, seed):
    offsets = LoadPlan(rate, burstiness, seed=seed).offsets(4000)
    assert offsets[0] == 0.0
    assert offsets == sorted(offsets)
    assert offsets == LoadPlan(rate, burstiness, seed=seed).offsets(4000)
    gaps = [later - earlier for earlier, later in pairwise(offsets)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / rate, rel=0.2)
    # Coefficient of variation of a gamma distribution: 1 / sqrt(shape).
    assert statistics.pstdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.2)


OUTPUT = LengthRange(9, 9)


def texts(path, count=3):
    made = read_workload(path, count, OUTPUT, seed=0)
    return sorted(tuple(turn.content for turn in conversation.turns) for conversation in made)


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\nsecond\nthird\n")
    assert texts(path) == [("first",), ("second",), ("third",)]


def test_a_short_file_is_used_again(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("only\n")
    assert texts(path, 4) == [("only",)] * 4


def test_json_lines_may_be_prompts_or_messages_and_say_their_output(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    lines = [{"prompt": "p", "output_tokens": 3}, {"messages": [*messages, {"role": "user", "content": "v"}]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert texts(path, 2) == [("p",), ("u", "v")]
    outputs = {turn.content: turn.output_tokens for c in read_workload(path, 2, OUTPUT, 0) for turn in c.turns}
    assert outputs == {"p": 3, "u": 9, "v": 9}


def test_sharegpts_form_gives_what_people_said(tmp_path):
    path = tmp_path / "share.json"
    said = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}, {"from": "human", "value": "q2"}]
    path.write_text(json.dumps([{"id": "x", "conversations": said}]))
    assert texts(path, 1) == [("q1", "q2")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "no prompts"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}', "entry 1 must be an object with one of"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}', "entry 2 has no text"),
        ("a.jsonl", '{"prompt": "x", "output_tokens": 0}', "output_tokens"),
        ("a.json", "{}", "must be a list"),
        ("a.json", '[{"conversations": ["x"]}]', "entry 1"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match=said):
        read_workload(path, 1, OUTPUT, 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match="nothing-here"):
        read_workload(tmp_path / "nothing-here.txt", 1, OUTPUT, 0)
