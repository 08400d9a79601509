"""Matchers: masks are never empty, the end is allowed exactly where the grammar accepts, drafts leave no trace."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.structured.compiler import GrammarCompiler
from pagoda.structured.matcher import GrammarMatcher
from pagoda.structured.spec import GrammarSpec
from pagoda.structured.vocabulary import GrammarVocabulary
from pagoda.text.tokenizer import Tokenizer
from tests.support.gguf_files import gguf_bytes, metadata_of
from tests.support.tokenizers import save_tokenizer

DEMO = Path(__file__).parents[3] / "runtime/pagoda/demo_model"
EOS, START, END = 0, 1, 2

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TAGGED = GrammarSpec.of_structural_tag(
    {
        "structures": [
            {"begin": "<fn=a>", "schema": {"type": "integer"}, "end": "</fn>"},
            {"begin": "<fn=b>", "schema": {"type": "boolean"}, "end": "</fn>"},
        ],
        "triggers": ["<fn="],
    }
)


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(GrammarVocabulary.from_directory(DEMO))


def matcher_of(spec: GrammarSpec, **options: Any) -> GrammarMatcher:
    return compiler().matcher(spec, **{"eos_token_ids": (EOS,), **options})


def tokens_of(text: str) -> list[int]:
    tokens: list[int] = compiler().vocabulary.tokenizer.tokenize_str(text)
    return tokens


def text_of(token_ids: Sequence[int]) -> str:
    data: bytes = compiler().vocabulary.tokenizer.decode_bytes([each for each in token_ids if each > END])
    return data.decode()


def masks_of(matcher: GrammarMatcher, drafts: Sequence[int] = ()) -> list[set[int]]:
    words = np.zeros((1 + len(drafts), matcher.num_words), dtype=np.int32)
    matcher.fill(words, drafts)
    return [set(np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0].tolist()) for row in words]


def walk(matcher: GrammarMatcher, seed: int, most: int = 300) -> Iterator[tuple[set[int], int, bool]]:
    """Random allowed tokens until the output is complete: of each step the mask, the token, and whether it was the last."""
    choose = random.Random(seed).choice
    for _ in range(most):
        (allowed,) = masks_of(matcher)
        token_id = choose(sorted(allowed))
        is_complete = matcher.advance(token_id)
        assert matcher.error is None
        yield allowed, token_id, is_complete
        if is_complete:
            return


SPECS = {
    "schema": GrammarSpec.of_json_schema(PERSON),
    "compact schema": GrammarSpec(kind="json_schema", source=json.dumps(PERSON), whitespace=False),
    "anything": GrammarSpec.of_json_schema(True),
    "object": GrammarSpec.of_json_object(),
    "regex": GrammarSpec.of_regex("^[a-z]{2,4}-(1|22)+$"),
    "choice": GrammarSpec.of_choice(["red", "green", 'a "quoted" one', "塔"]),
    "Lark": GrammarSpec.of_grammar('start: "a" start "b" | "ab"'),
    "GBNF": GrammarSpec.of_grammar('root ::= "x" root "y" | "xy"'),
    "tag": TAGGED,
}


def is_valid(name: str, text: str) -> bool:
    if name in ("schema", "compact schema"):
        jsonschema.validate(json.loads(text), PERSON)
        return name == "schema" or re.search(r"\s", re.sub(r'"[^"]*"', "", text)) is None
    if name in ("anything", "object"):
        return name == "anything" or isinstance(json.loads(text), dict)
    if name == "regex":
        return re.fullmatch("[a-z]{2,4}-(1|22)+", text) is not None
    if name == "choice":
        return text in json.loads(SPECS["choice"].source)
    if name in ("Lark", "GBNF"):
        half = len(text) // 2
        return text in ("a" * half + "b" * half, "x" * half + "y" * half) and half > 0
    return all(
        re.match(r"<fn=a>-?\d+</fn>|<fn=b>(true|false)</fn>", text[at.start() :]) for at in re.finditer("<fn=", text)
    )


@pytest.mark.parametrize("name", SPECS)
@given(seed=st.integers(0, 10_000))
def test_a_complete_output_is_valid_and_the_end_is_allowed_nowhere_else(name: str, seed: int) -> None:
    matcher = matcher_of(SPECS[name])
    output: list[int] = []
    was_complete = False
    for allowed, token_id, is_complete in walk(matcher, seed):
        was_complete = is_complete
        assert allowed
        assert not allowed & {START, END}
        if EOS in allowed:
            assert is_valid(name, text_of(output))
        if token_id != EOS:
            output.append(token_id)
    if was_complete:
        assert is_valid(name, text_of(output))


@pytest.mark.parametrize("name", ["schema", "regex", "choice", "tag"])
@given(seed=st.integers(0, 10_000), data=st.data())
def test_drafts_are_masked_as_they_would_be_and_leave_no_trace(name: str, seed: int, data: st.DataObject) -> None:
    path = [token_id for _, token_id, _ in walk(matcher_of(SPECS[name]), seed, most=12)]
    split = data.draw(st.integers(0, len(path)))
    drafts = path[split:]
    wrong_at = data.draw(st.none() | st.integers(0, max(0, len(drafts) - 1)))
    if wrong_at is not None and drafts:
        drafts[wrong_at] = data.draw(st.integers(0, 2047))
    matcher, plain = matcher_of(SPECS[name]), matcher_of(SPECS[name])
    for token_id in path[:split]:
        matcher.advance(token_id)
        plain.advance(token_id)
    found = masks_of(matcher, drafts)
    assert masks_of(matcher) == found[:1]
    counts = True
    for mask, draft in zip(found, [*drafts, None], strict=True):
        if not counts:
            assert len(mask) == 32 * matcher.num_words
            continue
        assert mask == masks_of(plain)[0]
        counts = draft is not None and draft in mask and not plain.advance(draft)
    fresh = matcher_of(SPECS[name])
    for token_id in path[:split]:
        fresh.advance(token_id)
    for token_id in path[split:]:
        assert masks_of(matcher) == masks_of(fresh)
        assert matcher.advance(token_id) == fresh.advance(token_id)


@pytest.mark.parametrize("end", [[END], tokens_of("</think>")], ids=["one token", "several tokens"])
def test_reasoning_is_free_and_does_not_end_and_the_grammar_begins_behind_it(end: list[int]) -> None:
    matcher = matcher_of(SPECS["choice"].after(end))
    everything = set(range(2048))
    for token_id in (500, START, *tokens_of("red </thin </"), *end[:-1]):
        assert masks_of(matcher) == [everything - {EOS}]
        assert not matcher.advance(token_id)
    # The end of the reasoning inside of drafts.
    red = tokens_of("red")
    masks = masks_of(matcher, [end[-1], *red])
    assert masks[0] == everything - {EOS}
    assert masks[1] == masks_of(matcher_of(SPECS["choice"]))[0]
    assert masks_of(matcher) == [everything - {EOS}]
    assert not matcher.advance(end[-1])
    for token_id in red[:-1]:
        assert not matcher.advance(token_id)
    assert matcher.advance(red[-1])


def test_reasoning_that_may_be_left_out_begins_with_its_token() -> None:
    spec = SPECS["choice"].after([END], opened_by=[START])
    grammar = masks_of(matcher_of(SPECS["choice"]))[0]
    assert masks_of(matcher_of(spec)) == [grammar | {START}]
    thinking = matcher_of(spec)
    for token_id in (START, 500, START, END):
        assert not thinking.advance(token_id)
    assert masks_of(thinking) == [grammar]
    plain = matcher_of(spec)
    assert [plain.advance(token_id) for token_id in tokens_of("red")][-1]
    assert masks_of(matcher_of(spec), [START, 500, END])[1:] == [set(range(2048)) - {EOS}] * 2 + [grammar]


def test_min_tokens_and_ignore_eos_hold_the_end_back_while_anything_else_is_allowed() -> None:
    digits = GrammarSpec.of_regex("1+")
    held = matcher_of(digits, min_tokens=3)
    for count in range(5):
        (allowed,) = masks_of(held)
        assert (EOS in allowed) == (count >= 3)
        assert not held.advance(tokens_of("1")[0])
    ignoring = matcher_of(digits, ignore_eos=True)
    ignoring.advance(tokens_of("1")[0])
    assert EOS not in masks_of(ignoring)[0]
    # A grammar that is finished ends the output, whatever was asked.
    (red, *rest) = tokens_of("red")
    finished = matcher_of(SPECS["choice"], min_tokens=100, ignore_eos=True)
    results = [finished.advance(token_id) for token_id in (red, *rest)]
    assert results == [False] * len(rest) + [True]


def test_special_stop_tokens_end_where_the_grammar_accepts() -> None:
    matcher = matcher_of(GrammarSpec.of_regex("1+"), eos_token_ids=(), stop_token_ids=(END,))
    assert END not in masks_of(matcher)[0]
    matcher.advance(tokens_of("1")[0])
    assert END in masks_of(matcher)[0]
    assert EOS not in masks_of(matcher)[0]


def test_copies_of_one_grammar_go_their_own_ways() -> None:
    first, second = matcher_of(SPECS["choice"]), matcher_of(SPECS["choice"])
    before = masks_of(second)
    first.advance(tokens_of("red")[0])
    assert masks_of(second) == before


def test_a_token_that_is_not_allowed_is_an_error_and_no_exception() -> None:
    matcher = matcher_of(SPECS["choice"])
    assert not matcher.advance(tokens_of("x")[0])
    assert matcher.error is not None
    assert len(masks_of(matcher)[0]) == 32 * matcher.num_words


def test_whitespace_is_bounded() -> None:
    matcher = matcher_of(SPECS["object"])
    for text in ("{", "\n"):
        for token_id in tokens_of(text):
            matcher.advance(token_id)
    newline, space = tokens_of("\n")[0], tokens_of(" ")[0]
    count = 0
    while space in masks_of(matcher)[0]:
        assert newline not in masks_of(matcher)[0]
        matcher.advance(space)
        count += 1
        assert count < 100


CANNOT: dict[str, GrammarSpec] = {
    "unique items": GrammarSpec.of_json_schema({"type": "array", "uniqueItems": True}),
    "not": GrammarSpec.of_json_schema({"not": {"type": "string"}}),
    "if": GrammarSpec.of_json_schema({"if": {"type": "string"}, "then": {"minLength": 2}}),
    "contains": GrammarSpec.of_json_schema({"type": "array", "contains": {"type": "string"}}),
    "dependent": GrammarSpec.of_json_schema({"dependentRequired": {"a": ["b"]}}),
    "property names": GrammarSpec.of_json_schema({"propertyNames": {"maxLength": 2}}),
    "unknown format": GrammarSpec.of_json_schema({"type": "string", "format": "no-such"}),
    "another document": GrammarSpec.of_json_schema({"$ref": "http://example.com/schema"}),
    "leniency": GrammarSpec.of_json_schema({"not": {}, "x-guidance": {"lenient": True}}),
    "nothing": GrammarSpec.of_json_schema(False),
    "numbers that are not exact": GrammarSpec.of_json_schema({"type": "integer", "minimum": 10**300}),
    "one number that is not exact": GrammarSpec.of_json_schema({"items": {"minimum": -(2**63), "maximum": -(2**63)}}),
    "look-ahead": GrammarSpec.of_regex("a(?=b)"),
    "a word boundary": GrammarSpec.of_regex(r"\bred\b"),
    "lines": GrammarSpec.of_regex("(?m)^a$"),
    "a back-reference": GrammarSpec.of_regex(r"(a)\1"),
    "priorities": GrammarSpec.of_grammar('start: A\nA.2: "a"'),
    "a style of arguments": GrammarSpec.of_structural_tag(
        {"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}
    ),
    "what text must not have": GrammarSpec.of_structural_tag({"format": {"type": "any_text", "excludes": ["x"]}}),
    "a part of a tag": GrammarSpec.of_structural_tag(
        {"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": "b", "repeats": 2}}
    ),
    "no Lark": GrammarSpec.of_grammar("start: (("),
    "no tag": GrammarSpec.of_structural_tag({"format": {"type": "no_such"}}),
    "no trigger": GrammarSpec.of_structural_tag({"structures": [], "triggers": ["<"]}),
    "a tag without trigger": GrammarSpec.of_structural_tag(
        {"structures": [{"begin": "<a>", "schema": {}, "end": ""}, {"begin": "b", "end": ""}], "triggers": ["<"]}
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_enforced_is_refused_by_name(case: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        matcher_of(CANNOT[case])
    assert refused.value.param
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "bounds", [{"minimum": -(2**63), "maximum": 2**63 - 1}, {"minimum": -1e300, "maximum": 2**53 + 1}]
)
def test_bounds_beyond_what_is_exact_are_narrowed_to_it(bounds: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"maximum": {"type": "integer", **bounds}, "b": {"const": {"minimum": 10**30}}},
    }
    spec = GrammarSpec.of_json_schema({**schema, "required": ["maximum", "b"]})
    for number, is_allowed in ((2**53 - 1, True), (2**53, False), (1 - 2**53, True), (-(2**53), False)):
        matcher, taken = matcher_of(spec), True
        for token_id in tokens_of(f'{{"maximum":{number},"b":{{"minimum":{10**30}}}}}'):
            taken = taken and token_id in masks_of(matcher)[0]
            if taken:
                matcher.advance(token_id)
        assert taken == is_allowed, number


FORMATS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "a tag": (
        {
            "type": "tag",
            "begin": "<t>",
            "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
            "end": "</t>",
        },
        ["<t>12</t>"],
        ["<t>x</t>", "12", "<t>1</t>x"],
    ),
    "special tokens": (
        {"type": "tag", "begin": "<|im_start|>f", "content": {"type": "any_text"}, "end": ["<|im_end|>", "!"]},
        [],
        ["f x !"],
    ),
    "text with an end": (
        {"type": "tag", "begin": "(", "content": {"type": "any_text"}, "end": ")"},
        ["(some text)", "()"],
        ["(a)b", "x"],
    ),
    "alternatives in order": (
        {
            "type": "sequence",
            "elements": [
                {
                    "type": "or",
                    "elements": [{"type": "const_string", "value": "a"}, {"type": "const_string", "value": "b"}],
                },
                {"type": "regex", "pattern": "/[0-9]+"},
            ],
        },
        ["a/12", "b/3"],
        ["c/1", "a12"],
    ),
    "separated tags": (
        {
            "type": "tags_with_separator",
            "separator": ",",
            "at_least_one": True,
            "tags": [{"type": "tag", "begin": "<", "content": {"type": "regex", "pattern": "[0-9]"}, "end": ">"}],
        },
        ["<1>", "<1>,<2>"],
        ["", "<1><2>", "<1>,"],
    ),
    "exactly one of triggered tags": (
        {
            "type": "triggered_tags",
            "triggers": ["<"],
            "at_least_one": True,
            "stop_after_first": True,
            "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": {"type": "null"}}, "end": "!"}],
        },
        ["<f>null!", "some text <f>null!"],
        ["text", "<g>", "<f>null! more"],
    ),
}


def accepts(spec: GrammarSpec, text: str) -> bool:
    matcher = matcher_of(spec)
    token_ids = tokens_of(text)
    for index, token_id in enumerate(token_ids, start=1):
        if token_id not in masks_of(matcher)[0]:
            return False
        if matcher.advance(token_id):
            return index == len(token_ids)
    return EOS in masks_of(matcher)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_structural_tags_in_xgrammars_form(name: str) -> None:
    form, good, bad = FORMATS[name]
    spec = GrammarSpec.of_structural_tag({"type": "structural_tag", "format": form})
    assert [accepts(spec, text) for text in good] == [True] * len(good)
    assert [accepts(spec, text) for text in bad] == [False] * len(bad)


def test_special_tokens_in_tags_stand_for_themselves() -> None:
    spec = GrammarSpec.of_structural_tag({"type": "structural_tag", "format": FORMATS["special tokens"][0]})
    matcher = matcher_of(spec)
    assert masks_of(matcher) == [{START}]
    for token_id in (START, *tokens_of("f x")):
        assert not matcher.advance(token_id)
    assert END in masks_of(matcher)[0]


def sentencepiece() -> tokenizers.Tokenizer:
    """As the BPE of SentencePiece is converted: spaces as U+2581, bytes as tokens of their own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "塔", "▁ab", "▁▁"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_level_bpe", "unigram_byte_fallback", "unigram", "sentencepiece", "demo"])
def test_tokens_have_the_bytes_that_the_tokenizer_gives_them(tmp_path: Path, kind: str) -> None:
    if kind == "sentencepiece":
        sentencepiece().save(str(tmp_path / "tokenizer.json"))
    else:
        tmp_path = DEMO if kind == "demo" else save_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer.from_directory(tmp_path)
    vocabulary = GrammarVocabulary.from_directory(tmp_path, tokenizer.vocab_size + 40)
    assert vocabulary.tokenizer.vocab_size == tokenizer.vocab_size + 40
    in_file = len(tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab())
    for token_id in range(in_file):
        # 0xFF begins no character, and marks special tokens there.
        if tokenizer.token(token_id) not in vocabulary.special_tokens and tokenizer.token_bytes(token_id) != b"\xff":
            assert vocabulary.tokenizer.decode_bytes([token_id]) == tokenizer.token_bytes(token_id)


def test_a_unigram_model_writes_what_a_grammar_allows(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "unigram")
    tokenizer = Tokenizer.from_directory(tmp_path)
    compiler = GrammarCompiler(GrammarVocabulary.from_directory(tmp_path, tokenizer.vocab_size))
    matcher = compiler.matcher(GrammarSpec.of_regex("[a-e ]{5,40}"), eos_token_ids=(EOS,), ignore_eos=True)
    taken = []
    choose = random.Random(0).choice
    while True:
        (mask,) = masks_of(matcher)
        if mask == {EOS}:
            break
        taken.append(choose(sorted(mask)))
        if matcher.advance(taken[-1]):
            break
        assert matcher.error is None
    assert re.fullmatch("[a-e ]{5,40}", b"".join(map(tokenizer.token_bytes, taken)).decode())


def test_a_tokenizer_without_bytes_is_refused_in_a_sentence(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "word_piece")
    with pytest.raises(ConfigError, match="cannot use a WordPiece tokenizer: whether there is a space"):
        GrammarVocabulary.from_directory(tmp_path)


def test_no_tokenizer_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        GrammarVocabulary.from_directory(tmp_path)


def test_a_gguf_file_has_the_vocabulary_of_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata_of(demo_checkpoint(), "llama")))
    read, expected = map(GrammarVocabulary.from_directory, (tmp_path / "m.gguf", demo_checkpoint()))
    assert read.tokenizer.vocab_size > 2000
    for token_id in range(read.tokenizer.vocab_size):
        assert read.tokenizer.decode_bytes([token_id]) == expected.tokenizer.decode_bytes([token_id])


@pytest.mark.parametrize("end", [[END], tokens_of("</think>")], ids=["one token", "several tokens"])
@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("kind", ["choice", "text"])
def test_reasoning_ends_when_its_budget_is_used_up(kind: str, budget: int, end: list[int]) -> None:
    spec = replace(SPECS["choice"] if kind == "choice" else GrammarSpec(kind="text"), reasoning_budget=budget)
    everything = set(range(2048))
    behind = everything if kind == "text" else masks_of(matcher_of(SPECS["choice"]))[0]
    matcher = matcher_of(spec.after(end))
    # In drafts as in tokens that are kept.
    masks = masks_of(matcher, [500] * budget + end)
    assert [len(mask) == 1 for mask in masks] == [False] * budget + [True] * len(end) + [False]
    for number in range(budget):
        assert matcher.restricts(1) == (kind == "choice")
        assert masks_of(matcher) == [masks[number]] == [everything if kind == "text" else everything - {EOS}]
        assert not matcher.advance(500)
    for token_id in end:
        assert matcher.restricts(1)
        assert masks_of(matcher) == [{token_id}]
        assert not matcher.advance(token_id)
    assert masks_of(matcher) == [behind]
    assert kind == "choice" or not matcher.restricts(100)


def test_reasoning_that_ends_in_time_is_not_ended_again() -> None:
    spec = replace(GrammarSpec(kind="text"), reasoning_budget=5, reasoning_left_by=(7,))
    for last in (END, 7):
        matcher = matcher_of(spec.after([END]))
        for token_id in (500, last):
            matcher.advance(token_id)
        for _ in range(20):
            assert masks_of(matcher) == [set(range(2048))]
            matcher.advance(500)
    # It does not begin, or it does.
    optional = spec.after([END], opened_by=[START])
    plain, thinking = matcher_of(optional), matcher_of(optional)
    assert not plain.advance(500)
    assert not plain.restricts(100)
    for token_id in (START, *[500] * 5):
        thinking.advance(token_id)
    assert masks_of(thinking) == [{END}]


def test_an_opening_of_several_tokens_is_found_by_its_text() -> None:
    spec = replace(GrammarSpec(kind="text"), reasoning_budget=2).after([END], opened_by=tokens_of("<think>"))
    for text, opens in (
        ("<think>", True),
        ("\n<think>", True),
        ("<thin", False),
        ("<thick>", False),
        ("a <think>", False),
    ):
        matcher = matcher_of(spec)
        for token_id in tokens_of(text):
            matcher.advance(token_id)
        for _ in range(2):
            matcher.advance(500)
        assert (masks_of(matcher) == [{END}]) == opens, text
