"""Grammars of calls hold an answer to what the parser reads, in every format that has one."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import llguidance
import pytest

from pagoda.errors import InvalidRequestError
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.structured.structural_tag import lark_of_structural_tag
from pagoda.structured.vocabulary import GrammarVocabulary
from pagoda.text.responses.checkpoint import format_of, make_parser
from pagoda.text.responses.message import AssistantMessage
from pagoda.text.responses.structural_tags import (
    _WRITTEN,
    _Keywords,
    _Loose,
    _Markup,
    calls_or_json,
    calls_or_text,
    example,
    required_calls,
)
from pagoda.text.responses.tools import ToolSet
from pagoda.text.tokenizer import Tokenizer

TOOLS = ToolSet(
    {
        "f": {
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "n": {"type": "integer"},
                "e": {"enum": ["x", "y"]},
                "o": {"type": "object", "properties": {"k": {"type": "boolean"}}, "required": ["k"]},
            },
            "required": ["s", "n", "e"],
            "additionalProperties": False,
        },
        "g": {"type": "object", "properties": {}},
    }
)
ARGUMENTS: dict[str, Any] = {"s": "a b", "n": 12, "e": "y", "o": {"k": True}}


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary.from_directory(demo_checkpoint())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(demo_checkpoint())


def call_of(name: str, function: str, arguments: dict[str, Any]) -> str:
    written = _WRITTEN[name]
    match written.arguments:
        case None:
            body = json.dumps(arguments)
        case _Markup() as markup:
            body = "".join(
                (markup.begin if isinstance(value, str) or not markup.json_begin else markup.json_begin).replace(
                    "KEY", key
                )
                + (value if isinstance(value, str) else json.dumps(value))
                + markup.end
                for key, value in arguments.items()
            )
        case _Keywords():
            body = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
        case _Loose(quote):
            body = loose(arguments, quote)
    number = f"0{written.number_end}" if written.number_end else ""
    return written.begin.replace("NAME", function) + number + body + written.end


def loose(value: Any, quote: str) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{loose(item, quote)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(loose(item, quote) for item in value) + "]"
    return f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value)


def answer_of(name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    written = _WRITTEN[name]
    return written.section[0] + written.between.join(call_of(name, *call) for call in calls) + written.section[1]


def accepts(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, tag: dict[str, Any], text: str) -> bool:
    grammar = lark_of_structural_tag(tag, vocabulary.special_tokens, {"whitespace_flexible": True})
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.get_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("name", _WRITTEN)
def test_the_grammar_takes_what_the_parser_reads(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [("f", ARGUMENTS), ("g", {})]
    if _WRITTEN[name].is_single:
        calls.pop()
    text = answer_of(name, *calls)
    assert read(name, text) == calls
    tag = required_calls(name, TOOLS)
    assert accepts(vocabulary, tokenizer, tag, text)
    some = {key: value for key, value in ARGUMENTS.items() if key != "o"}
    assert accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", some)))
    tag = required_calls(name, ToolSet({"g": TOOLS.parameters["g"]}))
    assert accepts(vocabulary, tokenizer, tag, example(tag["format"]))
    assert read(name, example(tag["format"])) == [("g", {})]


def read(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    parser = make_parser(format_of(name, None), TOOLS)
    message = AssistantMessage.of([*parser.feed(text), *parser.finish()])
    assert message.content == ""
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


@pytest.mark.parametrize("name", _WRITTEN)
def test_what_is_left_of_a_required_call_that_was_cut_off_is_no_content(name: str) -> None:
    text = answer_of(name, ("f", ARGUMENTS), *([("g", {})] if not _WRITTEN[name].is_single else []))
    for length in range(len(text)):
        parser = make_parser(format_of(name, None), TOOLS)
        parser.drops_content = True
        message = AssistantMessage.of([*parser.feed(text[:length]), *parser.finish()])
        assert message.content == ""
        assert len(message.tool_calls) <= 2


@pytest.mark.parametrize("name", [name for name, written in _WRITTEN.items() if written.preceded_by])
def test_reasoning_may_stand_before_the_calls(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str) -> None:
    text = "<|channel|>analysis<|message|>I look.\nNow.<|end|><|start|>assistant" + answer_of(name, ("f", ARGUMENTS))
    assert accepts(vocabulary, tokenizer, required_calls(name, TOOLS), text)
    assert read(name, text) == [("f", ARGUMENTS)]


LOOSE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "tree": {"$ref": "#/$defs/tree"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "either": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
        "open": {"type": "object"},
        "any": {},
    },
    "$defs": {
        "tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "size": {"type": "number"}}},
    },
}


@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ({}, True),
        ({"tree": {"left": {"left": {}, "size": 1.5}}, "either": None}, True),
        ({"words": ["ab", "c"], "either": 3, "open": {"a": [1, {"b": "x"}]}, "any": [True, None, "y"]}, True),
        ({"open": {}, "any": "text"}, True),
        ({"tree": {"left": 1}}, False),
        ({"words": []}, False),
        ({"words": ["a", "b", "c"]}, False),
        ({"words": ["abcd"]}, False),
        ({"either": 2}, False),
        ({"other": 1}, False),
    ],
)
@pytest.mark.parametrize("name", [name for name, written in _WRITTEN.items() if isinstance(written.arguments, _Loose)])
def test_loose_json_keeps_to_its_schema(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str, arguments: dict[str, Any], is_right: bool
) -> None:
    tag = required_calls(name, ToolSet({"f": LOOSE}))
    assert accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", arguments))) == is_right


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "a+"}, "pattern"),
        ({"type": "string", "format": "date"}, "format"),
        ({"not": {}}, "not"),
        ({"allOf": [{}]}, "allOf"),
        ({"$ref": "https://example.org/x"}, "$ref"),
        ({"type": "array", "prefixItems": [{}]}, "prefixItems"),
    ],
)
def test_what_loose_json_cannot_keep_is_refused_by_name(
    vocabulary: GrammarVocabulary, schema: dict[str, Any], named: str
) -> None:
    tag = required_calls("gemma4", ToolSet({"f": {"type": "object", "properties": {"a": schema}}}))
    with pytest.raises(InvalidRequestError, match=re.escape(named)):
        lark_of_structural_tag(tag, vocabulary.special_tokens, {})


@pytest.mark.parametrize("required", [[], ["a"], ["b"], ["c"], ["a", "c"], ["a", "b", "c"]])
def test_keyword_arguments_keep_their_order_and_separators(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, required: list[str]
) -> None:
    properties = {"a": {"type": "boolean"}, "b": {"type": "string"}, "c": {"type": "null"}}
    tools = ToolSet({"f": {"type": "object", "properties": properties, "required": required}})
    tag = required_calls("pythonic", tools)
    written = {"a": "a=True", "b": 'b="x"', "c": "c=None"}
    for size in range(4):
        for keys in itertools.permutations(written, size):
            text = f"[f({', '.join(written[key] for key in keys)})]"
            is_right = list(keys) == sorted(keys) and set(required) <= set(keys)
            assert accepts(vocabulary, tokenizer, tag, text) == is_right, text


def test_arguments_may_refer_to_definitions(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"p": {"type": "array", "items": {"$ref": "#/$defs/point"}}},
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    }
    for name in _WRITTEN:
        tag = required_calls(name, ToolSet({"f": schema}))
        assert accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", {"p": [{"x": 1}]}))), name
        assert not accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", {"p": [{"x": "1"}]}))), name


@pytest.mark.parametrize("name", _WRITTEN)
def test_the_grammar_refuses_other_calls(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str) -> None:
    tag = required_calls(name, TOOLS)
    for wrong in (
        answer_of(name, ("h", {})),
        answer_of(name, ("f", {"s": "a"})),
        answer_of(name, ("f", {**ARGUMENTS, "n": True})),
        answer_of(name, ("f", {**ARGUMENTS, "e": "z"})),
        "Hello!",
        "",
    ):
        assert not accepts(vocabulary, tokenizer, tag, wrong), wrong
    only = required_calls(name, ToolSet(TOOLS.parameters, parallel=False))
    assert accepts(vocabulary, tokenizer, only, answer_of(name, ("f", ARGUMENTS)))
    assert not accepts(vocabulary, tokenizer, only, answer_of(name, ("f", ARGUMENTS), ("g", {})))


@pytest.mark.parametrize("name", [name for name, written in _WRITTEN.items() if written.trigger])
def test_strict_tools_leave_text_free(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str) -> None:
    tag = calls_or_text(name, TOOLS, ["f"])
    for right in ("Hello!", "Look: " + answer_of(name, ("f", ARGUMENTS)), "", answer_of(name, ("g", {}))):
        assert accepts(vocabulary, tokenizer, tag, right), right
    assert not accepts(vocabulary, tokenizer, tag, "Look: " + answer_of(name, ("f", {"s": "a"})))


@pytest.mark.parametrize("name", _WRITTEN)
def test_a_tool_that_is_not_strict_takes_any_arguments(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str
) -> None:
    tag = calls_or_text(name, TOOLS, ["g"])
    for arguments in ({"s": 1, "z": "a"}, ARGUMENTS, {}):
        assert accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", arguments))), arguments


BARE = [name for name, written in _WRITTEN.items() if written.bare]


@pytest.mark.parametrize("name", BARE)
def test_strict_tools_without_a_marker_are_held_once_a_call_begins(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str
) -> None:
    tag = calls_or_text(name, TOOLS, ["f"])
    right, wrong = answer_of(name, ("f", ARGUMENTS)), answer_of(name, ("f", {"s": "a"}))
    mark, end = _WRITTEN[name].bare.marked  # type: ignore[union-attr]
    for text in (
        *(
            "",
            "Hello!",
            "[1, 2]",
            "[see](f)",
            "f(1)",
            "{",
            "[f]",
            '{"name": "Mia", "age": 3}',
            '{"city": "Rome"}',
            "\n\n[]",
        ),
        *(right, "\n" + right, answer_of(name, ("f", ARGUMENTS), ("g", {})), f"Look: {mark}{right}{end}"),
        *("Look: " + wrong, '[{"name": "f"}]'),  # no call: it does not begin the answer
    ):
        assert accepts(vocabulary, tokenizer, tag, text), text
        if text.lstrip() == right:
            assert read(name, text) == [("f", ARGUMENTS)]
    for text in (wrong, "\n " + wrong, f"{mark}{wrong}{end}", answer_of(name, ("f", ARGUMENTS), ("f", {"s": "a"}))):
        assert not accepts(vocabulary, tokenizer, tag, text), text
    only = calls_or_text(name, ToolSet(TOOLS.parameters, parallel=False), ["f"])
    assert accepts(vocabulary, tokenizer, only, right)
    assert not accepts(vocabulary, tokenizer, only, answer_of(name, ("f", ARGUMENTS), ("g", {})))


def test_strict_calls_of_llama_may_be_written_as_it_does(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    tag = calls_or_text("llama3_json", TOOLS, ["f"])
    arguments = json.dumps(ARGUMENTS)
    for text in (
        f'{{"type": "function", "name": "f", "parameters": {arguments}}}',
        f'{{"name":"f","arguments":{arguments}}}',
        f'{{\n  "name": "f",\n  "parameters": {arguments}\n}}',
    ):
        assert accepts(vocabulary, tokenizer, tag, text), text
        assert read("llama3_json", text) == [("f", ARGUMENTS)]


ANALYSIS, COMMENTARY, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
NEXT = "<|end|><|start|>assistant"


def test_strict_tools_in_harmony(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    tag = calls_or_text("openai", TOOLS, ["f"])
    right, wrong = answer_of("openai", ("f", ARGUMENTS)), answer_of("openai", ("f", {"s": "a"}))
    arguments = json.dumps(ARGUMENTS)
    for text in (
        *(f"{FINAL}Hello!", f"{ANALYSIS}I think.{NEXT}{FINAL}Hello!", right, f"{ANALYSIS}a{NEXT}{right}"),
        f"{ANALYSIS}a{NEXT}{COMMENTARY}I look.{NEXT}{ANALYSIS}b{NEXT}{right}",
        f" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{arguments}",
        f"<|channel|>commentary to=functions.f json<|message|>{arguments}",
        answer_of("openai", ("g", {"any": 1})),
    ):
        assert accepts(vocabulary, tokenizer, tag, text), text
    for text in (wrong, f"{ANALYSIS}a{NEXT}{wrong}", f"{ANALYSIS}a", answer_of("openai", ("h", {}))):
        assert not accepts(vocabulary, tokenizer, tag, text), text
    once = calls_or_text("openai", TOOLS, ["f"], one_reasoning=True)
    assert accepts(vocabulary, tokenizer, once, f"{ANALYSIS}a{NEXT}{COMMENTARY}I look.{NEXT}{right}")
    assert not accepts(vocabulary, tokenizer, once, f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{right}")


@pytest.mark.parametrize("name", [name for name, written in _WRITTEN.items() if written.trigger])
def test_an_answer_with_a_schema_is_calls_or_that(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer, name: str
) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tag = calls_or_json(name, TOOLS, schema)
    assert tag is not None
    assert accepts(vocabulary, tokenizer, tag, '{"x": 1}')
    assert accepts(vocabulary, tokenizer, tag, answer_of(name, ("f", ARGUMENTS)))
    assert not accepts(vocabulary, tokenizer, tag, '{"x": "a"}')
    assert not accepts(vocabulary, tokenizer, tag, "Hello!")
