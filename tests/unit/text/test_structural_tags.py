"""Grammars of calls hold an answer to what the parser reads, in every format that has one."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.structured.structural_tag import lark_of_structural_tag
from pagoda.structured.vocabulary import GrammarVocabulary
from pagoda.text.responses.checkpoint import format_of, make_parser
from pagoda.text.responses.message import AssistantMessage
from pagoda.text.responses.structural_tags import _WRITTEN, calls_or_json, calls_or_text, required_calls
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
    if written.parameter is None:
        body = json.dumps(arguments)
    else:
        before, after = written.parameter
        body = "".join(
            before.replace("KEY", key) + (value if isinstance(value, str) else json.dumps(value)) + after
            for key, value in arguments.items()
        )
    return written.begin.replace("NAME", function) + body + written.end


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
    text = answer_of(name, ("f", ARGUMENTS), ("g", {}))
    parser = make_parser(format_of(name, None), TOOLS)
    message = AssistantMessage.of([*parser.feed(text), *parser.finish()])
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [("f", ARGUMENTS), ("g", {})]
    assert message.content == ""
    assert accepts(vocabulary, tokenizer, required_calls(name, TOOLS), text)


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
    assert tag is not None
    for right in ("Hello!", "Look: " + answer_of(name, ("f", ARGUMENTS)), "", answer_of(name, ("g", {}))):
        assert accepts(vocabulary, tokenizer, tag, right), right
    assert not accepts(vocabulary, tokenizer, tag, "Look: " + answer_of(name, ("f", {"s": "a"})))


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
