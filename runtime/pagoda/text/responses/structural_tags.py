"""Tool calls of a family as structural tags: what a grammar holds an answer to that must have calls, or strict ones.

The tags write calls as the families' chat templates do, white space included; `machine.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.text.responses.schema_types import is_verbatim, schema_types
from pagoda.text.responses.tools import ToolSet

Tag = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """One call is `begin ARGUMENTS end`, with the name in place of NAME; several have `between` between them.

    `section`: what stands around all calls. `trigger`: begins calls after other text; empty where calls are the whole answer.
    `parameter`: what stands before (KEY in it) and behind the value of an argument in markup; without it arguments are JSON.
    """

    begin: str
    end: str
    between: str = ""
    section: tuple[str, str] = ("", "")
    trigger: str = ""
    parameter: tuple[str, str] | None = None


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
        parameter=("<parameter=KEY>\n", "\n</parameter>\n"),
    ),
    "llama3_json": _Written(begin='{"name": "NAME", "parameters": ', end="}", between="; "),
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
        parameter=("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "minimax_m2": _Written(
        begin='<invoke name="NAME">\n',
        end="</invoke>\n",
        section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
        trigger="<minimax:tool_call>",
        parameter=('<parameter name="KEY">', "</parameter>\n"),
    ),
}


def has_structural_tags(call_name: str | None) -> bool:
    """Whether calls of this format can be held to a grammar."""
    return call_name in _WRITTEN


def required_calls(call_name: str, tools: ToolSet) -> Tag:
    """The structural tag of an answer that is one call or more, and nothing else."""
    return {"format": _calls(_WRITTEN[call_name], tools)}


def calls_or_text(call_name: str, tools: ToolSet, strict: Iterable[str]) -> Tag | None:
    """The structural tag of free text in which calls may begin; the arguments of `strict` tools keep to their schemas.

    None where no marker announces calls.
    """
    written = _WRITTEN[call_name]
    names = set(strict)
    loose = {name: schema if name in names else {"type": "object"} for name, schema in tools.parameters.items()}
    if not written.trigger:
        return None
    tag = _calls(written, ToolSet(loose, tools.parallel))
    tags = [tag] if tag["type"] == "tag" else tag["tags"]
    return {"format": {"type": "triggered_tags", "triggers": [written.trigger], "tags": tags}}


def calls_or_json(call_name: str, tools: ToolSet, schema: Mapping[str, Any] | bool) -> Tag | None:
    """The structural tag of an answer that is calls, or JSON that is valid under `schema`.

    None where calls begin as any JSON does.
    """
    if not _WRITTEN[call_name].trigger:
        return None
    content = {"type": "json_schema", "json_schema": schema}
    return {"format": {"type": "or", "elements": [_calls(_WRITTEN[call_name], tools), content]}}


def _calls(written: _Written, tools: ToolSet) -> Tag:
    calls = {
        "type": "tags_with_separator",
        "tags": [_call(written, name, tools) for name in tools.parameters],
        "separator": written.between,
        "at_least_one": True,
        "stop_after_first": not tools.parallel,
    }
    begin, end = written.section
    return {"type": "tag", "begin": begin, "content": calls, "end": end} if begin else calls


def _call(written: _Written, name: str, tools: ToolSet) -> Tag:
    schema = tools.parameters[name]
    if written.parameter is None:
        content: Tag = {"type": "json_schema", "json_schema": {"type": "object", **schema}}
    else:
        required = schema.get("required")
        names = set(required) if isinstance(required, list) else set()
        arguments = [
            _argument(written.parameter, key, value, is_required=key in names)
            for key, value in tools.properties(name).items()
        ]
        content = {"type": "sequence", "elements": arguments or [{"type": "const_string", "value": ""}]}
    return {"type": "tag", "begin": written.begin.replace("NAME", name), "content": content, "end": written.end}


def _argument(parameter: tuple[str, str], key: str, schema: object, *, is_required: bool) -> Tag:
    begin, end = parameter
    tag = {"type": "tag", "begin": begin.replace("KEY", key), "content": _value(schema), "end": end}
    if is_required:
        return tag
    return {"type": "tags_with_separator", "tags": [tag], "separator": "", "stop_after_first": True}


def _value(schema: object) -> Tag:
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(values, Sequence) and values and not isinstance(values, str):
        shown = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        return {"type": "or", "elements": [{"type": "const_string", "value": value} for value in shown]}
    if is_verbatim(schema_types(schema)):
        return {"type": "any_text"}
    return {"type": "json_schema", "json_schema": schema}
