"""Tool calls of a family as structural tags: what a grammar holds an answer to that must have calls, or strict ones.

The tags write calls as the families' chat templates do, white space included; `machine.py` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import InvalidRequestError
from pagoda.structured.spec import GrammarSpec
from pagoda.text.responses.schema_types import is_verbatim, schema_types
from pagoda.text.responses.tools import ToolSet

Tag = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Markup:
    """Each argument in markup: `begin` (KEY in it), the value, `end`. `json_begin`: of one that is no string."""

    begin: str
    end: str
    json_begin: str = ""


@dataclass(frozen=True, slots=True)
class _Keywords:
    """Arguments as Python's keyword arguments."""


@dataclass(frozen=True, slots=True)
class _Loose:
    """An object without quotes around keys, and with marks around strings."""

    quote: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bare:
    """Calls at the beginning of an answer, told from other text by the names of tools; in regular expressions.

    `first` and `further` begin a call, up to its arguments, with NAME in place of the name; `close` ends it. `last` ends the
    calls. `begun`: what only a call begins with, NAMES in place of all names. `marked`: the marker that announces such calls
    after other text, and the one behind them.
    """

    first: str
    further: str
    close: str
    last: str = ""
    begun: str
    marked: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """One call is `begin ARGUMENTS end`, with the name in place of NAME; several have `between` between them.

    `section`: what stands around all calls. `trigger`: begins calls after other text; empty where calls are the whole answer.
    `number_end`: the call's number follows `begin`, and this follows the number. `arguments`: None for JSON. `preceded_by`:
    what may stand before the calls, reasoning where the grammar is of the whole answer. `is_single`: at most one call.
    `bare`: how calls begin an answer that no marker announces.
    """

    begin: str
    end: str
    between: str = ""
    section: tuple[str, str] = ("", "")
    trigger: str = ""
    number_end: str = ""
    arguments: _Markup | _Keywords | _Loose | None = None
    preceded_by: Tag | None = None
    is_single: bool = False
    bare: _Bare | None = None


def _harmony_message(channel: str) -> Tag:
    return {
        "type": "tag",
        "begin": f"<|channel|>{channel}<|message|>",
        "content": {"type": "any_text"},
        "end": "<|end|><|start|>assistant",
    }


# Keyword arguments of any kind: brackets within them are not counted.
_ANY_KEYWORDS = r'([^"\'()]|"([^"\\]|\\.)*"|\'([^\'\\]|\\.)*\')*'
_SPACE = r"[ \n\t]{0,8}"
_NAME_IN_JSON = r'"name"[ ]?:[ ]?"NAME"'
_BARE_JSON = (
    rf'\{{{_SPACE}("type"[ ]?:[ ]?"function",{_SPACE})?{_NAME_IN_JSON}[ ]?,{_SPACE}"(parameters|arguments)"[ ]?:[ ]?'
)
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_WRITTEN: Mapping[str, _Written] = {
    "hermes": _Written(
        begin='<tool_call>\n{"name": "NAME", "arguments": ',
        end="}\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
    ),
    "qwen3_coder": _Written(
        begin="<tool_call>\n<function=NAME>\n",
        end="</function>\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
        arguments=_Markup(begin="<parameter=KEY>\n", end="\n</parameter>\n"),
    ),
    "llama3_json": _Written(
        begin='{"name": "NAME", "parameters": ',
        end="}",
        between="; ",
        bare=_Bare(
            first=_SPACE + _BARE_JSON,
            further=f";{_SPACE}{_BARE_JSON}",
            close=rf"{_SPACE}\}}",
            begun=r'\s*\{\s*("(type|id)"\s*:\s*"[^"]*"\s*,\s*)*("name"\s*:\s*"(NAMES)"|"(parameters|arguments)"\s*:)',
            marked=("<|python_tag|>", ""),
        ),
    ),
    "mistral": _Written(begin="[TOOL_CALLS]NAME[ARGS]", end="", trigger="[TOOL_CALLS]"),
    "deepseek_v3": _Written(
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        between="\n",
        section=_DEEPSEEK,
        trigger=_DEEPSEEK[0],
    ),
    "deepseek_v31": _Written(
        begin="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        section=_DEEPSEEK,
        trigger=_DEEPSEEK[0],
    ),
    "glm45": _Written(
        begin="<tool_call>NAME\n",
        end="</tool_call>",
        between="\n",
        trigger="<tool_call>",
        arguments=_Markup(begin="<arg_key>KEY</arg_key>\n<arg_value>", end="</arg_value>\n"),
    ),
    "minimax_m2": _Written(
        begin='<invoke name="NAME">\n',
        end="</invoke>\n",
        section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
        trigger="<minimax:tool_call>",
        arguments=_Markup(begin='<parameter name="KEY">', end="</parameter>\n"),
    ),
    "deepseek_v32": _Written(
        begin='<｜DSML｜invoke name="NAME">\n',
        end="</｜DSML｜invoke>\n",
        section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
        trigger="<｜DSML｜function_calls>",
        arguments=_Markup(
            begin='<｜DSML｜parameter name="KEY" string="true">',
            end="</｜DSML｜parameter>\n",
            json_begin='<｜DSML｜parameter name="KEY" string="false">',
        ),
    ),
    "kimi_k2": _Written(
        begin="<|tool_call_begin|>functions.NAME:",
        number_end="<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        trigger="<|tool_calls_section_begin|>",
    ),
    "pythonic": _Written(
        begin="NAME(",
        end=")",
        between=", ",
        section=("[", "]"),
        arguments=_Keywords(),
        bare=_Bare(
            first=rf"{_SPACE}\[{_SPACE}NAME\(",
            further=rf",{_SPACE}NAME\(",
            close=r"\)",
            last=rf"{_SPACE}\]",
            begun=r"\s*\[\s*(NAMES)\s*\(",
            marked=("<|python_start|>", "<|python_end|>"),
        ),
    ),
    "olmo3": _Written(
        begin="NAME(",
        end=")",
        between="\n",
        section=("<function_calls>\n", "\n</function_calls>"),
        trigger="<function_calls>",
        arguments=_Keywords(),
    ),
    "gemma4": _Written(
        begin="<|tool_call>call:NAME", end="<tool_call|>", trigger="<|tool_call>", arguments=_Loose('<|"|>')
    ),
    "functiongemma": _Written(
        begin="<start_function_call>call:NAME",
        end="<end_function_call>",
        trigger="<start_function_call>",
        arguments=_Loose("<escape>"),
    ),
    # The grammar ends before `<|call|>`, which ends a generation, and which the grammar accepts as that.
    "openai": _Written(
        begin="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        end="",
        is_single=True,
        preceded_by=_harmony_message("analysis"),
    ),
}


def has_structural_tags(call_name: str | None) -> bool:
    """Whether calls of this format can be held to a grammar."""
    return call_name in _WRITTEN


def formats_with_tags() -> Iterable[str]:
    """The names of these formats."""
    return _WRITTEN


def required_calls(call_name: str, tools: ToolSet) -> Tag:
    """The structural tag of an answer that is one call or more, and nothing else."""
    written = _WRITTEN[call_name]
    calls = _calls(written, tools)
    if written.preceded_by is not None:
        calls = {"type": "sequence", "elements": [_optional(written.preceded_by), calls]}
    return {"format": calls}


def calls_or_text(call_name: str, tools: ToolSet, strict: Iterable[str], *, one_reasoning: bool = False) -> Tag:
    """The structural tag of free text in which calls may begin; the arguments of `strict` tools keep to their schemas.

    `one_reasoning`: see `harmony_answer`.
    """
    written = _WRITTEN[call_name]
    free = frozenset(tools.parameters) - set(strict)
    if call_name == "openai":
        return harmony_answer(tools, free, one_reasoning=one_reasoning)
    if written.bare is not None:
        return {"format": _bare_calls_or_text(written, written.bare, tools, free)}
    tag = _calls(written, tools, free)
    tags = [tag] if tag["type"] == "tag" else tag["tags"]
    return {"format": {"type": "triggered_tags", "triggers": [written.trigger], "tags": tags}}


def _bare_calls_or_text(written: _Written, bare: _Bare, tools: ToolSet, free: frozenset[str]) -> Tag:
    """One lexeme tells a call from other text, for the lexer takes the longest: so the name is in what begins it."""
    names = [re.escape(name) for name in tools.parameters]
    begun = bare.begun.replace("NAMES", "|".join(names))

    def one_of(begin: str) -> Tag:
        calls = [
            _in_order(
                _pattern(begin.replace("NAME", re.escape(name))),
                _arguments(written.arguments, name, tools, free),
                _pattern(bare.close),
            )
            for name in tools.parameters
        ]
        return {"type": "or", "elements": calls}

    further: Tag = {
        "type": "tags_with_separator",
        "tags": [{"type": "tag", "begin": "", "content": one_of(bare.further), "end": ""}],
        "separator": "",
    }
    calls = _in_order(
        one_of(bare.first),
        *([further] if tools.parallel else []),
        *([_pattern(bare.last)] if bare.last else []),
    )
    mark, end = bare.marked
    announced = _in_order({"type": "other_text", "pattern": begun, "end": mark}, calls, _constant(end))
    return {"type": "or", "elements": [calls, announced, {"type": "other_text", "pattern": begun}]}


def harmony_answer(
    tools: ToolSet,
    free: frozenset[str] = frozenset(),
    content: Tag | None = None,
    *,
    one_reasoning: bool = False,
) -> Tag:
    """The structural tag of an answer in channels: any messages before, then a call, or a message in the final channel.

    `free`: tools whose arguments are any object. `content`: the form of what is said in the final channel. `one_reasoning`:
    nothing but the first message may be reasoning, so that the end of that is the end of it.
    """
    analysis = _harmony_message("analysis")
    # What is said before a call is content, too, so where that has a form nothing is said.
    before = [*([] if content else [_harmony_message("commentary")]), *([] if one_reasoning else [analysis])]
    last = [
        _in_order(
            _one_of(f"<|channel|>commentary to=functions.{name} ", f" to=functions.{name}<|channel|>commentary "),
            _one_of("<|constrain|>json<|message|>", "json<|message|>"),
            _arguments(None, name, tools, free),
        )
        for name in tools.parameters
    ]
    final = _in_order(_constant("<|channel|>final<|message|>"), content or {"type": "any_text"})
    reasoning = [_optional(analysis)] if one_reasoning else []
    messages: list[Tag] = [{"type": "tags_with_separator", "tags": before, "separator": ""}] if before else []
    return {"format": _in_order(*reasoning, *messages, {"type": "or", "elements": [*last, final]})}


def as_format(spec: GrammarSpec) -> Tag:
    """What `spec` asks of a text as a format within a structural tag; raises `InvalidRequestError` where there is none."""
    match spec.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": spec.parsed}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return _pattern(spec.source)
        case "choice":
            return _one_of(*spec.parsed)
        case "structural_tag" if isinstance(spec.parsed.get("format"), Mapping):
            return dict(spec.parsed["format"])
    raise InvalidRequestError(
        f"thinking_token_budget cannot be held beside a {spec.kind} in the format of this model's answers",
        "thinking_token_budget",
    )


def calls_or_json(call_name: str, tools: ToolSet, schema: Mapping[str, Any] | bool) -> Tag | None:
    """The structural tag of an answer that is calls, or JSON that is valid under `schema`.

    None where calls begin as any JSON does.
    """
    if not _WRITTEN[call_name].trigger:
        return None
    content = {"type": "json_schema", "json_schema": schema}
    return {"format": {"type": "or", "elements": [_calls(_WRITTEN[call_name], tools), content]}}


def example(part: Tag) -> str:
    """A text that a format of calls allows: its first one, with everything in it that may be left out."""
    match part["type"]:
        case "const_string":
            return str(part["value"])
        case "any_text":
            return "text"
        case "regex":
            return "0"
        case "json_schema" | "loose_json" if part["json_schema"].get("type") == "object":
            return "{}"
        case "json_schema":
            return "1"
        case "or":
            return example(part["elements"][0])
        case "sequence" | "separated_sequence":
            return str(part.get("separator", "")).join(map(example, part["elements"]))
        case "tags_with_separator":
            return example(part["tags"][0])
    return f"{part['begin']}{example(part['content'])}{part['end']}"


def _calls(written: _Written, tools: ToolSet, free: frozenset[str] = frozenset()) -> Tag:
    calls = {
        "type": "tags_with_separator",
        "tags": [_call(written, name, tools, free) for name in tools.parameters],
        "separator": written.between,
        "at_least_one": True,
        "stop_after_first": written.is_single or not tools.parallel,
    }
    begin, end = written.section
    return {"type": "tag", "begin": begin, "content": calls, "end": end} if begin else calls


def _call(written: _Written, name: str, tools: ToolSet, free: frozenset[str]) -> Tag:
    content = _arguments(written.arguments, name, tools, free)
    if written.number_end:
        number: Tag = {"type": "regex", "pattern": "[0-9]{1,4}"}
        content = {"type": "sequence", "elements": [number, _constant(written.number_end), content]}
    return {"type": "tag", "begin": written.begin.replace("NAME", name), "content": content, "end": written.end}


def _arguments(syntax: _Markup | _Keywords | _Loose | None, name: str, tools: ToolSet, free: frozenset[str]) -> Tag:
    if name in free and isinstance(syntax, _Keywords):
        return _pattern(_ANY_KEYWORDS)
    if name in free and isinstance(syntax, _Markup):
        return {"type": "any_text"}
    schema = {"type": "object", **({} if name in free else tools.parameters[name])}
    if syntax is None:
        return {"type": "json_schema", "json_schema": schema}
    if isinstance(syntax, _Loose):
        return {"type": "loose_json", "json_schema": schema, "quote": syntax.quote}
    required = schema.get("required")
    names = set(required) if isinstance(required, list) else set()
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = {
        key: {**definitions, **value} if definitions and isinstance(value, Mapping) else value
        for key, value in tools.properties(name).items()
    }
    if isinstance(syntax, _Keywords):
        return {
            "type": "separated_sequence",
            "separator": ", ",
            "elements": [
                {"type": "sequence", "elements": [_constant(f"{key}="), _python_value(value)]}
                for key, value in properties.items()
            ],
            "optional": [number for number, key in enumerate(properties) if key not in names],
        }
    arguments = [
        _argument(syntax, key, value) if key in names else _optional(_argument(syntax, key, value))
        for key, value in properties.items()
    ]
    return {"type": "sequence", "elements": arguments or [_constant("")]}


def _argument(syntax: _Markup, key: str, schema: object) -> Tag:
    content = _value(schema)
    is_json = content["type"] == "json_schema" or (content["type"] == "or" and not _is_text(schema))
    begin = syntax.json_begin if is_json and syntax.json_begin else syntax.begin
    return {"type": "tag", "begin": begin.replace("KEY", key), "content": content, "end": syntax.end}


def _optional(tag: Tag) -> Tag:
    return {"type": "tags_with_separator", "tags": [tag], "separator": "", "stop_after_first": True}


def _constant(text: str) -> Tag:
    return {"type": "const_string", "value": text}


def _one_of(*texts: str) -> Tag:
    return {"type": "or", "elements": [_constant(text) for text in texts]}


def _pattern(pattern: str) -> Tag:
    return {"type": "regex", "pattern": pattern}


def _in_order(*parts: Tag) -> Tag:
    return {"type": "sequence", "elements": list(parts)}


def _values(schema: object) -> list[Any]:
    """The values that are allowed, empty where they are not listed."""
    if isinstance(schema, Mapping) and "const" in schema:
        return [schema["const"]]
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []


def _is_text(schema: object) -> bool:
    return all(isinstance(value, str) for value in _values(schema))


def _value(schema: object) -> Tag:
    values = _values(schema)
    if values:
        shown = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        return {"type": "or", "elements": [_constant(value) for value in shown]}
    if is_verbatim(schema_types(schema)):
        return {"type": "any_text"}
    return {"type": "json_schema", "json_schema": schema}


def _python_value(schema: object) -> Tag:
    """JSON, but for Python's own names of the three constants."""
    if isinstance(schema, Mapping) and schema.get("type") == "boolean" and not _values(schema):
        return {"type": "or", "elements": [_constant("True"), _constant("False")]}
    if isinstance(schema, Mapping) and schema.get("type") == "null":
        return _constant("None")
    return {"type": "json_schema", "json_schema": schema}
