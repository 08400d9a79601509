"""Reasoning and tool calls of every family, as the families' templates write them; and what models write instead."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizersTokenizer

from pagoda.errors import CheckpointError, ConfigError
from pagoda.request import AnswerOptions
from pagoda.structured.compiler import GrammarCompiler
from pagoda.structured.spec import GrammarSpec
from pagoda.structured.vocabulary import GrammarVocabulary
from pagoda.text.detokenizer import MarkingDetokenizer
from pagoda.text.responses.checkpoint import AnswerFormat, answer_format, format_of, make_parser
from pagoda.text.responses.checkpoint_template import TemplateParser, read_response_template
from pagoda.text.responses.formats import CALL_NAMES, REASONING_NAMES
from pagoda.text.responses.marks import bind
from pagoda.text.responses.message import AssistantMessage, ToolCall
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.syntax import ResponseFormat
from pagoda.text.responses.tools import ToolSet
from pagoda.text.tokenizer import Tokenizer
from tests.support.harmony_cases import CASES
from tests.support.tokenizers import save_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "s": {"type": "string"},
        "o": {"type": "object"},
        "l": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        "e": {"enum": ["1", "2"]},
        "r": {"$ref": "#/$defs/flag"},
        "x": {"type": ["number", "string"]},
    },
    "$defs": {"flag": {"type": "boolean"}},
}
TOOLS = ToolSet({"f": SCHEMA, "g": {}, "get-it.now": {}})
ARGUMENTS: dict[str, Any] = {
    "n": -3,
    "s": 'a "quoted" \\ 塔🙂\n  <tag> </parameter> {[',
    "o": {"k": [1, None, True, 2.5, "z"]},
    "l": None,
    "e": "2",
    "r": False,
    "x": "text",
}

# Templates written for these tests from the families' published descriptions: how a message with calls is printed.
_PARAMETERS = "{% for k, v in call.arguments.items() %}OPEN{{ v if v is string else v | tojson }}CLOSE{% endfor %}"


def _parameters(open: str, close: str) -> str:
    return _PARAMETERS.replace("OPEN", open).replace("CLOSE", close)


def _calls(body: str, before: str = "", after: str = "", separator: str = "") -> str:
    between = "{% if not loop.last %}" + separator + "{% endif %}" if separator else ""
    return before + "{% for call in calls %}" + body + between + "{% endfor %}" + after


_THINK = "<think>\n{{ reasoning }}\n</think>\n\n"
_JSON = '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}'
_DS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_GEMMA = (
    "{% macro value(v) %}{% if v is string %}QUOTE{{ v }}QUOTE{% elif v is mapping %}{{ '{' }}{% for k, w in v.items() %}"
    "{{ k }}:{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% elif v is iterable %}[{% for w in v %}"
    "{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
)
WRITTEN: dict[str, tuple[str, str]] = {  # by the name of the format: reasoning, and calls
    "hermes": (_THINK, _calls("\n<tool_call>\n" + _JSON + "\n</tool_call>")),
    "qwen3_coder": (
        _THINK,
        _calls(
            "\n<tool_call>\n<function={{ call.name }}>\n"
            + _parameters("<parameter={{ k }}>\n", "\n</parameter>\n")
            + "</function>\n</tool_call>"
        ),
    ),
    "llama3_json": (
        "",
        _calls('{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}', separator="; "),
    ),
    "pythonic": (
        "",
        _calls(
            "{{ call.name }}({% for k, v in call.arguments.items() %}{{ k }}={{ v | python }}"
            "{{ ', ' if not loop.last }}{% endfor %})",
            "[",
            "]",
            ", ",
        ),
    ),
    "olmo3": (
        _THINK,
        _calls(
            "{{ call.name }}({% for k, v in call.arguments.items() %}{{ k }}={{ v | tojson }}"
            "{{ ', ' if not loop.last }}{% endfor %})\n",
            "<function_calls>\n",
            "</function_calls>",
        ),
    ),
    "mistral": (
        "[THINK]{{ reasoning }}[/THINK]",
        _calls("[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments | tojson }}"),
    ),
    "deepseek_v3": (
        _THINK,
        _calls(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.name }}\n```json\n{{ call.arguments | tojson }}\n```"
            "<｜tool▁call▁end｜>",
            *_DS,
            separator="\n",
        ),
    ),
    "deepseek_v31": (
        _THINK,
        _calls(
            "<｜tool▁call▁begin｜>{{ call.name }}<｜tool▁sep｜>{{ call.arguments | tojson }}<｜tool▁call▁end｜>", *_DS
        ),
    ),
    "deepseek_v32": (
        _THINK,
        _calls(
            '<｜DSML｜invoke name="{{ call.name }}">\n'
            + _parameters(
                '<｜DSML｜parameter name="{{ k }}" string="{{ "true" if v is string else "false" }}">',
                "</｜DSML｜parameter>\n",
            )
            + "</｜DSML｜invoke>\n",
            "\n\n<｜DSML｜function_calls>\n",
            "</｜DSML｜function_calls>",
        ),
    ),
    "openai": (
        "<|channel|>analysis<|message|>{{ reasoning }}<|end|><|start|>assistant",
        "<|channel|>commentary<|message|>{{ content }}<|end|>"
        + _calls(
            "<|start|>assistant<|channel|>commentary to=functions.{{ call.name }} <|constrain|>json<|message|>"
            "{{ call.arguments | tojson }}<|call|>"
        ),
    ),
    "glm45": (
        _THINK,
        _calls(
            "\n<tool_call>{{ call.name }}\n"
            + _parameters("<arg_key>{{ k }}</arg_key>\n<arg_value>", "</arg_value>\n")
            + "</tool_call>"
        ),
    ),
    "kimi_k2": (
        _THINK,
        _calls(
            "<|tool_call_begin|>functions.{{ call.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
            "{{ call.arguments | tojson }}<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
        ),
    ),
    "minimax_m2": (
        _THINK,
        _calls(
            '<invoke name="{{ call.name }}">\n'
            + _parameters('<parameter name="{{ k }}">', "</parameter>\n")
            + "</invoke>\n",
            "\n<minimax:tool_call>\n",
            "</minimax:tool_call>",
        ),
    ),
    "gemma4": (
        "<|channel>thought\n{{ reasoning }}<channel|>",
        _GEMMA.replace("QUOTE", '<|"|>')
        + _calls("<|tool_call>call:{{ call.name }}{{ value(call.arguments) }}<tool_call|>"),
    ),
    "functiongemma": (
        "",
        _GEMMA.replace("QUOTE", "<escape>")
        + _calls("<start_function_call>call:{{ call.name }}{{ value(call.arguments) }}<end_function_call>"),
    ),
}
REASONING = {"mistral": "mistral", "gemma4": "gemma4", "openai": "openai_gptoss"}
WITHOUT_CONTENT = ("llama3_json", "pythonic")  # calls are the whole answer


def format_named(name: str) -> ResponseFormat:
    return format_of(name, REASONING.get(name, "think"))


def written(name: str, content: str, reasoning: str, calls: list[ToolCall]) -> str:
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["python"] = repr
    thinks, called = WRITTEN[name]
    source = (thinks if reasoning else "") + ("" if "content" in called else "{{ content }}") + called
    functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    return environment.from_string(source).render(content=content, reasoning=reasoning, calls=functions)


def read(parser: ResponseParser, text: str, size: int | None = None) -> AssistantMessage:
    size = size or max(1, len(text))
    deltas = [delta for start in range(0, len(text), size) for delta in parser.feed(text[start : start + size])]
    return AssistantMessage.of([*deltas, *parser.finish()])


def parse(name: str, text: str, **options: Any) -> AssistantMessage:
    return read(make_parser(format_named(name), TOOLS, **options), text)


def arguments_of(message: AssistantMessage) -> list[Any]:
    return [json.loads(call.arguments) for call in message.tool_calls]


def test_every_format_has_a_template_here() -> None:
    assert set(WRITTEN) == set(CALL_NAMES.values())


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [None, 1])
def test_what_the_template_writes_is_read_back(name: str, size: int | None) -> None:
    calls = [
        ToolCall("f", arguments=json.dumps(ARGUMENTS)),
        ToolCall("g", arguments='{"a": "1"}'),
        ToolCall("g", arguments="{}"),
    ]
    content = "" if name in WITHOUT_CONTENT else "Let me see: 1 < 2."
    reasoning = "First {this}.\n\nThen that." if WRITTEN[name][0] else ""
    text = written(name, content, reasoning, calls)
    message = read(make_parser(format_named(name), TOOLS), text, size)
    assert (message.content, message.reasoning) == (content, reasoning)
    assert [call.name for call in message.tool_calls] == ["f", "g", "g"]
    assert arguments_of(message) == [ARGUMENTS, {"a": "1"}, {}]
    assert len({call.id for call in message.tool_calls}) == 3


@pytest.mark.parametrize("name", WRITTEN)
def test_every_beginning_of_an_answer_is_a_message(name: str) -> None:
    text = written(name, "Hm.", "Well.", [ToolCall("f", arguments='{"s": "x", "n": 1}')])
    for end in range(len(text)):
        message = parse(name, text[:end])
        assert [call.name for call in message.tool_calls] in ([], ["f"])
        for call in message.tool_calls:
            assert '{"s": "x", "n": 1}'.startswith(call.arguments) or call.arguments in ("{}", '{"s": "x"}')


@pytest.mark.parametrize("name", WRITTEN)
def test_a_tool_that_was_not_offered_is_content(name: str) -> None:
    text = written(name, "", "", [ToolCall("unknown", arguments='{"a": 1}')])
    message = parse(name, text)
    assert message.tool_calls == []
    assert "unknown" in message.content
    if name != "openai":
        assert message.content == text.lstrip() or message.content == text


@pytest.mark.parametrize("name", WRITTEN)
def test_markers_in_prose_stay_prose(name: str) -> None:
    markers = [calls.trigger for calls in format_named(name).calls if calls.trigger]
    text = "".join(f"One writes {marker} first, `{marker}` I mean. " for marker in markers) + "That is all."
    assert parse(name, text) == AssistantMessage(content=text)


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('<tool_call>{"name": "f", "arguments": {"n": 1}}}</tool_call> yes', "} yes", ['{"n": 1}']),
        ('<tool_call>{"name": "f", "arguments": {"n": 1}</tool_call>', "", ['{"n": 1}']),
        ('<tool_call>{"name": "f", "arguments": {"n": }}</tool_call>', "", ['{"n": }']),
        ('<tool_call>{"name": "f", "arguments": {\'n\': 1}}</tool_call>!', "!", ["{'n': 1}}"]),
        ('<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>', "", ['{"n": 1}']),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", ["{}"]),
        ('<tool_call>{"name": "f"}</tool_call>', "", ["{}"]),
        ('<tool_call>{"arguments": {"n": 1}, "name": "f"}</tool_call>', "", ['{"n": 1}']),
        ('<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>', "", ['{"s": "a\\nb"}']),
        ('<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>', "", ['{"s": "</tool_call>"}']),
        ('<tool_call>{"name": "f", "arguments": {"s": "a', "", ['{"s": "a']),
        ('<tool_call>{"name": "f", "x": [1, {}], "arguments": {}}\n\n<tool_call>{"name": "g"}', "", ["{}", "{}"]),
        ('<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", ["{}"]),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ("<tool_call>\n</tool_call>", "<tool_call>\n</tool_call>", []),
        ("a </tool_call> b", "a </tool_call> b", []),
        ("ends with <tool_", "ends with <tool_", []),
        ('x\n<tool_call>{"name": "f"}</tool_call>\ny', "x\n\ny", ["{}"]),
        (" \n", " \n", []),
    ],
)
def test_malformed_calls_have_a_defined_result_and_lose_no_text(text: str, content: str, arguments: list[str]) -> None:
    for size in (None, 1, 3):
        message = read(make_parser(format_named("hermes"), TOOLS), text, size)
        assert (message.content, [call.arguments for call in message.tool_calls]) == (content, arguments)


def test_an_object_that_is_no_call_is_content_where_no_marker_announces_calls() -> None:
    for text in ('{"answer": {"name": "f"}}', '{"name": "Bob", "age": 3}', "[1, 2]", "[f, g]", "{", "[f", "[]"):
        for name in ("llama3_json", "pythonic"):
            assert parse(name, text) == AssistantMessage(content=text)


def test_python_arguments_become_json() -> None:
    text = """[f(n=-1, s='it\\'s "x", (y)', o={"a": (1, 2.5), 'b': None}, l=[True, false, null], x=name)]"""
    (arguments,) = arguments_of(parse("pythonic", text))
    assert arguments == {
        "n": -1,
        "s": 'it\'s "x", (y)',
        "o": {"a": [1, 2.5], "b": None},
        "l": [True, False, None],
        "x": "name",
    }


def test_markup_values_follow_the_schema() -> None:
    values = {"n": "x1", "o": "{'k': True}", "l": "[1]", "e": "1", "r": "True", "x": "1.50", "unknown": "12"}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    (arguments,) = arguments_of(parse("qwen3_coder", f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"))
    assert arguments == {"n": "x1", "o": {"k": True}, "l": [1], "e": "1", "r": True, "x": 1.5, "unknown": "12"}


def test_a_call_ends_reasoning_that_was_not_closed() -> None:
    message = parse("hermes", 'hm <tool_call> hm\n<tool_call>{"name": "f"}</tool_call>', in_reasoning=True)
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("hm <tool_call> hm", "", 1)


def test_reasoning_that_the_prompt_opened() -> None:
    for text in ("hm</think>ok", "\nhm\n</think>\n\nok", "<think>\nhm</think> ok"):
        assert parse("hermes", text, in_reasoning=True) == AssistantMessage("ok", "hm")


def test_mistral_lists_and_ids() -> None:
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]'
    message = parse("mistral", text)
    assert arguments_of(message) == [{"n": 1}, {}]
    assert len(message.tool_calls[1].id) == 9
    (call,) = parse("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"n": 1}').tool_calls
    assert (call.id, call.arguments) == ("123456789", '{"n": 1}')


def test_kimi_ids_are_kept() -> None:
    text = written("kimi_k2", "", "", [ToolCall("f", arguments="{}"), ToolCall("get-it.now", arguments="{}")])
    assert [call.id for call in parse("kimi_k2", text).tool_calls] == ["functions.f:0", "functions.get-it.now:1"]


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    message = parse("openai", text)
    assert (message.reasoning, message.content) == ("one\n\ntwo", "Done.")
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("f", "{}")]
    assert parse("openai", " to=functions.f<|channel|>commentary<|message|>{}").tool_calls == [
        ToolCall("f", arguments="{}")
    ]
    assert parse("openai", "plain <b>text</b>") == AssistantMessage("plain <b>text</b>")
    assert parse("openai", "<|channel|>fin") == AssistantMessage()


def test_harmony_with_markers_that_are_tokens(tmp_path: Path) -> None:
    backend = TokenizersTokenizer.from_file(str(save_tokenizer(tmp_path, "byte_level_bpe") / "tokenizer.json"))
    markers = ("start", "channel", "message", "constrain", "end", "call")
    backend.add_special_tokens([f"<|{marker}|>" for marker in markers])
    tokenizer = Tokenizer(backend)
    text = "<|channel|>analysis<|message|>Say <|end|><|start|>assistant<|channel|>commentary to=functions.f<|constrain|>json"
    ids = tokenizer.encode(text + '<|message|>{"n": 1}<|call|>', add_special_tokens=False)
    message = read_ids(tokenizer, "openai", ids)
    assert (message.reasoning, message.content) == ("Say", "")
    assert message.tool_calls == [ToolCall("f", arguments='{"n": 1}')]


def test_endless_space_is_not_held_back() -> None:
    parser = make_parser(format_named("hermes"), TOOLS)
    assert sum(len(delta.text) for _ in range(3000) for delta in parser.feed(" ")) > 2500  # type: ignore[union-attr]


# Markers that are tokens.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    markers = [
        {
            "content": text,
            "special": special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, special in (("<tool_call>", False), ("</tool_call>", False), ("[TOOL_CALLS]", True), ("[ARGS]", True))
    ]
    decoder = {str(500 + index): marker for index, marker in enumerate(markers)}
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), "byte_level_bpe")
    backend = TokenizersTokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken(**marker) for marker in decoder.values()])
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


def read_ids(tokenizer: Tokenizer, name: str, ids: list[int], *, skip_special: bool = True) -> AssistantMessage:
    format, marks = bind(format_named(name), tokenizer)
    parser = make_parser(format, TOOLS, marks, skip_special=skip_special)
    detokenizer = MarkingDetokenizer(tokenizer, marks, skip_special_tokens=skip_special)
    texts = [*map(detokenizer.feed, ids), detokenizer.finish()]
    return read(parser, "".join(texts))


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` without the tokens of markers."""
    return [token_id for character in text for token_id in tokenizer.encode(character, add_special_tokens=False)]


CALL = '<tool_call>{"name": "f", "arguments": {"s": "塔"}}</tool_call>'


def test_markers_are_matched_by_their_token(tokenizer: Tokenizer) -> None:
    message = read_ids(tokenizer, "hermes", tokenizer.encode(CALL, add_special_tokens=False))
    assert [call.arguments for call in message.tool_calls] == ['{"s": "塔"}']
    assert read_ids(tokenizer, "hermes", spelled(tokenizer, CALL)) == AssistantMessage(content=CALL)


def test_a_markers_token_in_a_string_is_text(tokenizer: Tokenizer) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"s": "<tool_call> and </tool_call>"}}</tool_call>'
    (call,) = read_ids(tokenizer, "hermes", tokenizer.encode(text, add_special_tokens=False)).tool_calls
    assert json.loads(call.arguments) == {"s": "<tool_call> and </tool_call>"}


def test_special_markers_that_begin_nothing_are_skipped_like_others(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a[TOOL_CALLS] b", add_special_tokens=False)
    assert read_ids(tokenizer, "mistral", ids).content == "a b"
    assert read_ids(tokenizer, "mistral", ids, skip_special=False).content == "a[TOOL_CALLS] b"
    call = tokenizer.encode('a[TOOL_CALLS]f[ARGS]{"n": 1}', add_special_tokens=False)
    assert [call.arguments for call in read_ids(tokenizer, "mistral", call).tool_calls] == ['{"n": 1}']


def test_a_marker_ends_an_unfinished_character(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙂", add_special_tokens=False)[:1]
    message = read_ids(tokenizer, "hermes", [*half, *tokenizer.encode(CALL, add_special_tokens=False)])
    assert message.content == "\ufffd"
    assert len(message.tool_calls) == 1


# Which format a checkpoint has.


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ("{{ messages }}", None, None),
        ("<tool_call> {{ tools }}", "hermes", None),
        ("<think></think><tool_call>", "hermes", "think"),
        ("<tool_call>\n<function=x>\n<parameter=y></think>", "qwen3_coder", "think"),
        ("<tool_call>{{ x }}<arg_key></think>", "glm45", "think"),
        ("<|start_header_id|><|python_tag|>", "llama3_json", None),
        ("<｜tool▁calls▁begin｜>```json</think>", "deepseek_v3", "think"),
        ("<｜tool▁calls▁begin｜></think>", "deepseek_v31", "think"),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("<|start|><|channel|>analysis<|message|>", "openai", "openai_gptoss"),
        ("<|tool_call>call:<|channel>thought", "gemma4", "gemma4"),
    ],
)
def test_the_format_is_found_in_the_chat_template(
    tokenizer: Tokenizer, template: str, calls: str | None, reasoning: str | None
) -> None:
    found = answer_format(tokenizer, [template])
    assert (found.call_name, found.reasoning_name) == (calls, reasoning)


def test_options_override_what_is_found(tokenizer: Tokenizer) -> None:
    found = answer_format(tokenizer, ["<tool_call>"], tool_call_parser="llama4_json", reasoning_parser="deepseek_r1")
    assert (found.call_name, found.reasoning_name) == ("llama3_json", "deepseek_r1")
    off = answer_format(tokenizer, ["<tool_call></think>"], tool_call_parser="off", reasoning_parser="off")
    assert off.parser(AnswerOptions(tools={"f": {}}), [1], skip_special=True) is None
    with pytest.raises(ConfigError, match="hermes"):
        answer_format(tokenizer, [], tool_call_parser="nonsense")


def test_the_prompt_says_whether_the_answer_begins_in_reasoning(tokenizer: Tokenizer) -> None:
    def begins(tail: str, name: str = "qwen3", **options: Any) -> bool:
        found = answer_format(tokenizer, [], reasoning_parser=name)
        prompt = tokenizer.encode("What does <think> do?<|im_end|>" + tail, add_special_tokens=False)
        parser = found.parser(AnswerOptions(**options), prompt, skip_special=True)
        assert parser is not None
        return parser.is_reasoning

    assert begins("<|im_start|>assistant\n<think>\n")
    assert not begins("<|im_start|>assistant\n")
    assert not begins("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert begins("<|im_start|>assistant\n", "deepseek_r1")
    assert not begins("<|im_start|>assistant\n<think>\n\n</think>\n\n", "deepseek_r1")
    assert begins("<think>so far", continued="<think>so far")
    assert not begins("<think>so</think> far", continued="<think>so</think> far")


def test_a_constraint_begins_where_the_reasoning_ends(tokenizer: Tokenizer) -> None:
    spec = GrammarSpec.of_json_object()

    def bounds(tail: str, name: str = "qwen3", **options: Any) -> tuple[str, str]:
        found = answer_format(tokenizer, [], reasoning_parser=name)
        prompt = tokenizer.encode("What does <think> do?<|im_end|>" + tail, add_special_tokens=False)
        placed = found.constrained(spec, AnswerOptions(**options), prompt)
        assert placed is not None
        assert placed.alone == spec
        assert placed.reasoning_budget == options.get("thinking_token_budget")
        return decode(placed.starts_after), decode(placed.opened_by)

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    assert bounds("<|im_start|>assistant\n<think>\n") == ("</think>", "")
    assert bounds("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ("", "")
    assert bounds("<|im_start|>assistant\n", "deepseek_r1") == ("</think>", "")
    assert bounds("<|im_start|>assistant\n", "off") == ("", "")
    assert bounds("<|im_start|>assistant\n", "mistral") == ("", "")  # its markers are no tokens here
    assert bounds("<think>so</think> far", continued="<think>so</think> far") == ("", "")
    assert bounds("<|start|>assistant", "openai_gptoss") == ("<|channel|>final<|message|>", "")


def test_a_budget_bounds_reasoning_without_a_grammar(tokenizer: Tokenizer) -> None:
    def bounded(tail: str, name: str = "qwen3", **options: Any) -> GrammarSpec | None:
        found = answer_format(tokenizer, [], reasoning_parser=name, tool_call_parser="hermes")
        prompt = tokenizer.encode("<|im_end|>" + tail, add_special_tokens=False)
        return found.constrained(None, AnswerOptions(thinking_token_budget=7, **options), prompt)

    close = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    expected = GrammarSpec(kind="text", starts_after=close, reasoning_budget=7)
    assert bounded("<|im_start|>assistant\n<think>\n") == expected
    opening = tuple(tokenizer.encode("<think>", add_special_tokens=False))
    assert bounded("<|im_start|>assistant\n") == replace(expected, opened_by=opening)
    with_tools = bounded("<|im_start|>assistant\n<think>\n", tools={"f": {}})
    assert with_tools is not None
    assert with_tools.reasoning_left_by == (tokenizer.added_tokens["<tool_call>"],)
    assert bounded("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None  # there is none to bound


@pytest.mark.parametrize("budget", [0, 1, 6])
@pytest.mark.parametrize("form", [None, GrammarSpec.of_json_object(), GrammarSpec.of_choice(["red", "塔"])])
def test_a_budget_bounds_reasoning_in_channels(tmp_path: Path, budget: int, form: GrammarSpec | None) -> None:
    directory = save_tokenizer(tmp_path, "byte_level_bpe")
    backend = TokenizersTokenizer.from_file(str(directory / "tokenizer.json"))
    markers = ("start", "channel", "message", "constrain", "end", "call", "return")
    backend.add_special_tokens([f"<|{marker}|>" for marker in markers])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(directory)
    found = answer_format(tokenizer, [], reasoning_parser="openai_gptoss", tool_call_parser="openai")
    assert found.can_end_reasoning
    options = AnswerOptions(thinking_token_budget=budget, tools={"f": {}} if form is None else {})
    compiler = GrammarCompiler(GrammarVocabulary.from_directory(directory))

    def walk(seed: int) -> tuple[list[int], AssistantMessage]:
        """What a model says that reasons for as long as it may, with "塔" in pieces, and is random then."""
        spec = found.constrained(form, options, tokenizer.encode("<|start|>assistant", add_special_tokens=False))
        assert spec is not None
        matcher = compiler.matcher(spec, eos_token_ids=[tokenizer.added_tokens["<|return|>"]])
        wanted = tokenizer.encode("<|channel|>analysis<|message|>" + "塔" * 9, add_special_tokens=False)
        choose, ids = Random(seed).choice, []
        words = np.empty((1, matcher.num_words), dtype=np.int32)
        while len(ids) < 300:
            matcher.fill(words)
            assert matcher.error is None
            allowed = np.unpackbits(words[0].view(np.uint8), bitorder="little").nonzero()[0].tolist()
            wants = len(ids) < len(wanted) and wanted[: len(ids)] == ids and wanted[len(ids)] in allowed
            ids.append(wanted[len(ids)] if wants else choose(allowed))
            if matcher.advance(ids[-1]):
                break
        return ids, read_ids(tokenizer, "openai", ids)

    end = tokenizer.added_tokens["<|end|>"]
    num_ended = 0
    for seed in range(6):
        ids, message = walk(seed)
        header = len(tokenizer.encode("<|channel|>analysis<|message|>", add_special_tokens=False))
        assert 0 <= ids.index(end) - header - budget <= 3  # the rest of a character
        assert tokenizer.decode(ids, skip_special_tokens=False).count("<|channel|>analysis") == 1
        assert message.reasoning.replace("塔", "") == ""
        if len(ids) < 300 and form is not None:
            num_ended += 1
            assert (
                message.content in ("red", "塔") if form.kind == "choice" else json.loads(message.content) is not None
            )
    assert form is None or num_ended


def test_names_are_vllms() -> None:
    assert {"hermes", "qwen3_coder", "llama3_json", "mistral", "deepseek_v31", "glm45", "kimi_k2", "openai"} <= set(
        CALL_NAMES
    )
    assert {"qwen3", "deepseek_r1", "openai_gptoss", "mistral", "glm45"} <= set(REASONING_NAMES)


# A checkpoint's own template.


def _transformers_templates() -> dict[str, dict[str, Any]]:
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

    return {names[0]: template for names, template in _RESPONSE_TEMPLATE_FALLBACKS.items()}


_CLOSING = "<|im_end|>\n<|endoftext|>"
OWN = {
    "qwen2": (
        "<|im_start|>assistant\n",
        [
            f"<think>\nhm\n</think>\n\nHi{_CLOSING}",
            f'Hi\n\n<tool_call>\n{{"name": "f", "arguments": {{"n": 1}}}}\n</tool_call>\n<tool_call>\n{{"name": "g", '
            f'"arguments": {{}}}}\n</tool_call>{_CLOSING}',
            "plain <tool_call",
        ],
    ),
    "qwen3_5": (
        "<|im_start|>assistant\n<think>\n",
        [
            "hm\n</think>\n\nok\n<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n<parameter=s>\nx y\n"
            f"</parameter>\n</function>\n</tool_call>{_CLOSING}"
        ],
    ),
    "gemma4": (
        "<|turn>model\n",
        ['<|channel>thought\nhm<channel|>Hello<|tool_call>call:f{n:1,s:<|"|>x{<|"|>}<tool_call|><turn|>'],
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoints_template_is_read_as_transformers_reads_it(name: str) -> None:
    from transformers.utils.chat_parsing import parse_response

    specification = _transformers_templates()[name]
    template = read_response_template(specification, "test")
    prefix, texts = OWN[name]
    tools = [
        {"type": "function", "function": {"name": key, "parameters": value}} for key, value in TOOLS.parameters.items()
    ]
    for text in texts:
        expected = parse_response(text, specification, prefix=prefix, tools=tools)
        for size in (None, 1, 3):
            message = read(TemplateParser(template, TOOLS, prefix), text, size)
            assert message.content == expected.get("content", "")
            assert message.reasoning == expected.get("reasoning_content", "")
            functions = [call["function"] for call in expected.get("tool_calls", [])]
            assert [call.name for call in message.tool_calls] == [function["name"] for function in functions]
            assert arguments_of(message) == [function["arguments"] for function in functions]


@pytest.mark.parametrize(("name", "grammar"), [("qwen2", "hermes"), ("qwen3_5", "qwen3_coder"), ("gemma4", "gemma4")])
def test_a_templates_calls_are_held_to_the_format_that_it_reads(tokenizer: Tokenizer, name: str, grammar: str) -> None:
    template = read_response_template(_transformers_templates()[name], "here")
    found = AnswerFormat(tokenizer, template=template)
    assert found.grammar_name == grammar
    if template.reasoning is not None:
        assert found.can_end_reasoning


def test_a_template_that_reads_no_known_calls_has_no_grammar(tokenizer: Tokenizer) -> None:
    fields = {"content": {}, "tool_calls": {"open": "<<", "close": ">>", "content": "json"}}
    template = read_response_template({"start_anchor": "<|im_start|>assistant", "fields": fields}, "here")
    assert AnswerFormat(tokenizer, template=template).grammar_name is None
    assert AnswerFormat(tokenizer).grammar_name is None


def test_what_a_template_cannot_read_is_content() -> None:
    template = read_response_template(_transformers_templates()["qwen2"], "test")
    for call in ("<tool_call>{nonsense}</tool_call>", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'):
        assert read(TemplateParser(template, TOOLS, ""), call).content == call


@pytest.mark.parametrize(
    "specification",
    [
        [],
        {"fields": {}},
        {"start_anchor": "x", "fields": {"a": {"open_pattern": "("}}},
        {"start_anchor": "x", "fields": {"a": {"open": ""}}},
        {"start_anchor": "x", "fields": {"a": {"content": "python"}}},
        {"start_anchor": "x", "fields": {"a": {}, "b": {}}},
        {"start_anchor": "x", "fields": {"a": {"content": "xml-inline"}}},
    ],
)
def test_a_broken_template_is_refused(specification: Any) -> None:
    with pytest.raises(CheckpointError, match="response_template"):
        read_response_template(specification, "test")


def test_a_slow_pattern_leaves_the_answer_as_content() -> None:
    hostile = {"start_anchor": "x", "fields": {"tool_calls": {"open_pattern": "(a|a)*b"}, "content": {}}}
    text = "a" * 3000
    assert read(TemplateParser(read_response_template(hostile, "test"), TOOLS, ""), text).content == text


def test_harmony_is_read_as_openais_own_package_reads_it() -> None:
    tools = ToolSet({"f": {}, "get_time": {}})
    choose = Random(0)
    for case in json.loads(CASES.read_text(encoding="utf-8")):
        text, said, thought, calls = case["text"], "", "", []
        for channel, recipient, content in case["messages"]:
            if recipient is not None:
                calls.append((recipient.removeprefix("functions."), content.strip() or "{}"))
            elif channel == "analysis":
                thought += content
            else:
                said += content
        for cuts in ([], range(1, len(text)), sorted(choose.sample(range(len(text)), min(5, len(text))))):
            parser = make_parser(format_of("openai", "openai_gptoss"), tools)
            pieces = [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]
            deltas = [delta for piece in pieces for delta in parser.feed(piece)]
            message = AssistantMessage.of([*deltas, *parser.finish()])
            assert _bare(message.content) == _bare(said), text
            assert _bare(message.reasoning) == _bare(thought), text
            assert [(call.name, call.arguments.strip()) for call in message.tool_calls] == calls, text


def _bare(text: str) -> str:
    """`text` without white space: that between parts is the format's."""
    return "".join(text.split())
