"""The `response_template` of a checkpoint's tokenizer_config.json, as transformers 5 defines it, on the parser of this room.

A template names the fields of a message, with what opens and closes each (a literal, several, or a regular expression) and
how its text is read. Its regular expressions are input: each search has a time limit, and where that passes, the rest of the
answer is content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from pagoda.errors import CheckpointError
from pagoda.text.responses.cursor import MAX_HELD_CHARACTERS, Reading
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.schema_types import coerce, schema_types
from pagoda.text.responses.syntax import Reasoning
from pagoda.text.responses.tools import ToolSet

MAX_FIELDS = 64
MAX_PATTERN_CHARACTERS = 4096
SEARCH_SECONDS = 0.05
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
_CONTENTS = frozenset({"text", "int", "float", "bool", "json", "xml-inline", "kv-lines"})
_FIELD_KEYS = frozenset(
    {
        *("open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional"),
        *("transform", "transform_each"),
    }
)
_PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True)
class _Delimiter:
    """`may_grow`: a match at the end of the text so far may become another one with more text. `literal`: the only text that
    matches, if there is only one."""

    pattern: Any
    may_grow: bool
    literal: str = ""


@dataclass(frozen=True)
class _Field:
    name: str
    open: _Delimiter | None
    close: _Delimiter | None
    content: str
    arguments: Mapping[str, Any]
    transform: Any
    transforms_each: bool


@dataclass(frozen=True)
class ResponseTemplate:
    """A checked template. `anchor` marks where the assistant's message begins in the prompt."""

    anchor: _Delimiter
    fields: tuple[_Field, ...]

    @property
    def reasoning(self) -> Reasoning | None:
        """The markers around the reasoning, where each is one text."""
        for field in self.fields:
            if field.name in _REASONING and field.open is not None and field.close is not None:
                opening, closing = field.open.literal.strip(), field.close.literal.strip()
                return Reasoning(opening, closing) if opening and closing else None
        return None

    def message_start(self, prompt: str) -> str:
        """What `prompt` has of the assistant's message already."""
        end = 0
        try:
            for match in self.anchor.pattern.finditer(prompt, timeout=SEARCH_SECONDS):
                end = match.end()
        except TimeoutError:
            return ""
        return prompt[end:] if end else ""


def read_response_template(specification: object, where: str) -> ResponseTemplate:
    """The template that `specification` is; raises `CheckpointError` that says what is wrong with it."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{where}: response_template {why}")

    if not isinstance(specification, Mapping) or not isinstance(specification.get("fields"), Mapping):
        raise refuse("must be an object with fields")
    if specification.get("version", 1) != 1:
        raise refuse("has a version other than 1")
    if len(specification["fields"]) > MAX_FIELDS:
        raise refuse(f"has {len(specification['fields'])} fields; at most {MAX_FIELDS} are allowed")
    try:
        anchor = _delimiter(specification, "start_anchor", "start_anchor_pattern")
        fields = tuple(_field(name, field) for name, field in specification["fields"].items())
    except (ValueError, regex.error) as error:
        raise refuse(str(error)[:300]) from None
    if anchor is None:
        raise refuse("must have start_anchor or start_anchor_pattern")
    if sum(field.open is None for field in fields) > 1:
        raise refuse("has several fields without open or open_pattern; one is allowed")
    return ResponseTemplate(anchor, fields)


def _field(name: str, field: object) -> _Field:
    if not isinstance(field, Mapping) or set(field) - _FIELD_KEYS:
        raise ValueError(f"field {name[:80]!r} must be an object with keys of {', '.join(sorted(_FIELD_KEYS))}")
    content = field.get("content", "text")
    if content not in _CONTENTS:
        raise ValueError(f"field {name[:80]!r} has content other than {', '.join(sorted(_CONTENTS))}")
    arguments = dict(field.get("content_args") or {})
    if content == "xml-inline":
        arguments["tag_pattern"] = _compiled(arguments.get("tag_pattern"))
        if not {"key", "value"} <= set(arguments["tag_pattern"].groupindex):
            raise ValueError("has a tag_pattern without the groups key and value")
    return _Field(
        name,
        _delimiter(field, "open", "open_pattern"),
        _delimiter(field, "close", "close_pattern"),
        content,
        arguments,
        field.get("transform"),
        field.get("transform_each") is True,
    )


def _delimiter(owner: Mapping[str, Any], literal_key: str, pattern_key: str) -> _Delimiter | None:
    literals = owner.get(literal_key)
    if literals is not None:
        literals = [literals] if isinstance(literals, str) else literals
        if (
            not isinstance(literals, list)
            or not literals
            or not all(isinstance(text, str) and text for text in literals)
        ):
            raise ValueError(f"has {literal_key} that is no text and no list of texts")
        longest_first = sorted(set(literals), key=len, reverse=True)
        may_grow = any(other != text and other.startswith(text) for text in literals for other in literals)
        return _Delimiter(
            _compiled("|".join(map(regex.escape, longest_first))), may_grow, literals[0] if len(literals) == 1 else ""
        )
    return None if owner.get(pattern_key) is None else _Delimiter(_compiled(owner[pattern_key]), may_grow=True)


def _compiled(pattern: object) -> Any:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"has a pattern that is no text of at most {MAX_PATTERN_CHARACTERS} characters")
    return regex.compile(pattern, regex.DOTALL)


class TemplateParser(ResponseParser):
    """An answer by a checkpoint's template. `prompt`: the prompt's text, at least from the assistant's message on.

    Fields named content and reasoning (or thinking) come as they are written; calls when they are whole.
    """

    reads_special_tokens = True

    def __init__(self, template: ResponseTemplate, tools: ToolSet, prompt: str, *, skip_special: bool = True) -> None:
        super().__init__(tools, skip_special=skip_special)
        self._template = template
        self._implicit = next((field for field in template.fields if field.open is None), None)
        self._current = self._implicit
        self._opened_with = ""
        self._captures: dict[str, str] = {}
        self._body: list[str] = []
        self._has_matched_nothing = False
        begun = template.message_start(prompt)
        if begun:  # what the prompt wrote of the message decides where the answer begins; it is not repeated
            self.feed(begun)
            self._has_text = {"content": False, "reasoning": False}
            self._separates = False
            self._space = ""
            self.num_calls = 0

    def _read(self) -> Reading[None]:
        cursor = self._cursor
        while not self.is_complete:
            try:
                found, settled = self._search()
            except TimeoutError:
                found, settled = None, len(cursor.text)
            if found is None:
                if settled > cursor.position:
                    self._take(cursor.text[cursor.position : settled])
                    cursor.position = settled
                if cursor.is_final:
                    break
                yield
                continue
            field, match = found
            self._take(cursor.text[cursor.position : match.start()])
            cursor.position = match.end()
            if field is None:
                self._close(match.group(), match.groupdict())
                if not match.group() and self._has_matched_nothing:
                    break
                self._has_matched_nothing = not match.group()
            else:
                self._close("", {})
                self._open(field, match)
        self._take(cursor.text[cursor.position :])
        cursor.position = len(cursor.text)
        if self._current is not self._implicit:
            self._close("", {}, is_cut=True)
        self._release_space()

    def _search(self) -> tuple[tuple[_Field | None, Any] | None, int]:
        """The first delimiter that can be relied on (None for the field: the current one's end), and where the text ends that
        no later text can make part of a delimiter."""
        cursor = self._cursor
        text, is_final = cursor.text, cursor.is_final
        watched: list[tuple[_Field | None, _Delimiter]] = []
        if self._current is self._implicit:
            watched += [(field, field.open) for field in self._template.fields if field.open is not None]
        if self._current is not None and self._current.close is not None:
            watched.append((None, self._current.close))
        settled, best = len(text), None
        for field, delimiter in watched:
            match = delimiter.pattern.search(text, cursor.position, partial=not is_final, timeout=SEARCH_SECONDS)
            if match is None:
                continue
            at_end = match.end() == len(text)
            grows = match.partial or (at_end and (delimiter.may_grow or match.start() == match.end()))
            if not is_final and grows and len(text) - match.start() <= MAX_HELD_CHARACTERS:
                settled = min(settled, match.start())
            elif not match.partial and (
                best is None or (match.start(), -match.end()) < (best[1].start(), -best[1].end())
            ):
                best = field, match
        if best is not None and (best[1].start() < settled or is_final):
            return best, settled
        return None, settled

    def _open(self, field: _Field, match: Any) -> None:
        self._current, self._opened_with = field, match.group()
        self._captures = {name: text for name, text in match.groupdict().items() if text is not None}
        self._next_part()
        self.is_reasoning = field.name in _REASONING

    def _take(self, text: str) -> None:
        """More text of the current field."""
        if not text:
            return
        name = "content" if self._current is None else self._current.name
        if name == "tool_calls":
            self._body.append(text)
        elif name in _REASONING:
            self._put(text, self._think)
        else:
            self._put(text, self._say)

    def _put(self, text: str, put: Callable[[str], None]) -> None:
        if self._separates or not any(self._has_text.values()):  # a part begins: white space there is the format's
            text = text.lstrip() if self._current is not self._implicit or self._separates else text
        if text:
            put(text)

    def _close(self, written: str, captures: Mapping[str, str | None], *, is_cut: bool = False) -> None:
        """The current field ends, with what was `written`; `is_cut`: the answer ends within it."""
        field, body = self._current, "".join(self._body)
        self._body.clear()
        self._current = self._implicit
        if field is not None and field.name == "tool_calls":
            scope = self._captures | {name: text for name, text in captures.items() if text is not None}
            if not self._call(field, body, scope):
                self.is_reasoning = False
                self._say(self._opened_with + body + written)
        if field is not self._implicit or written:
            self._next_part()
        if not is_cut:
            self.is_reasoning = False

    def _call(self, field: _Field, body: str, scope: Mapping[str, str]) -> bool:
        """Make calls of a field's text; False if it has none that can be made."""
        try:
            value = _parsed(body, field.content, field.arguments)
            if field.transforms_each:
                items = value if isinstance(value, list) else [value]
                value = [_transformed(field.transform, {**scope, **item}) for item in items]
            elif field.transform is not None:
                value = _transformed(field.transform, {**scope, "content": value})
            calls = [_function_of(item) for item in (value if isinstance(value, list) else [value])]
        except (ValueError, KeyError, TypeError, TimeoutError, RecursionError):
            return False
        if not calls or any(name not in self._tools.parameters for name, _, _ in calls):
            return False
        for name, call_id, arguments in calls:
            self._begin_call(name, call_id)
            self._argue(self._arguments(name, arguments))
            self._end_call()
            if self.is_complete:
                break
        return True

    def _arguments(self, name: str, arguments: Any) -> str:
        if isinstance(arguments, str):
            return arguments
        properties = self._tools.properties(name)
        if isinstance(arguments, Mapping):
            arguments = {
                key: coerce(value, types)
                if isinstance(value, str) and (types := schema_types(properties.get(key)))
                else value
                for key, value in arguments.items()
            }
        return json.dumps(arguments, ensure_ascii=False)


def _function_of(value: Any) -> tuple[str, str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("a call must be an object")
    function = value.get("function", value)
    name = function["name"]
    call_id = value.get("id")
    if not isinstance(name, str):
        raise ValueError("the name of a call must be a text")
    return name, call_id if isinstance(call_id, str) else "", function.get("arguments", {})


def _transformed(template: Any, scope: Mapping[str, Any]) -> Any:
    """`template` with its placeholders filled; one stands alone in its string."""
    if isinstance(template, Mapping):
        return {key: _transformed(value, scope) for key, value in template.items()}
    if isinstance(template, list):
        return [_transformed(value, scope) for value in template]
    match = _PLACEHOLDER.fullmatch(template) if isinstance(template, str) else None
    if match is None:
        return template
    value: Any = scope
    for key in match[1].split("."):
        value = value[key]
    return value


def _parsed(text: str, content: str, arguments: Mapping[str, Any]) -> Any:
    match content:
        case "json":
            return _loose_json(text, arguments)
        case "xml-inline":
            return _tags(text, arguments)
        case "kv-lines":
            return _key_lines(text, arguments)
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "bool":
            return text.strip().lower() in ("true", "1")
    return text.strip() if arguments.get("strip", True) else text


def _sub_parsed(text: str, parser: Any) -> Any:
    if not isinstance(parser, Mapping):
        return text
    return _parsed(text, str(parser.get("name", "text")), parser.get("args") or {})


def _loose_json(text: str, arguments: Mapping[str, Any]) -> Any:
    """JSON whose keys may be bare and whose strings may stand between marks of the format's own."""
    strings: list[str] = []

    def hide(match: Any) -> str:
        strings.append(match[1])
        return f"\x01{len(strings) - 1}\x02"

    working = text
    for opening, closing in _pairs(arguments.get("string_delims")):
        pattern = regex.escape(opening) + "(.*?)" + regex.escape(closing)
        working = regex.sub(pattern, hide, working, flags=regex.DOTALL, timeout=SEARCH_SECONDS)
    if arguments.get("unquoted_keys"):
        working = regex.sub(r"(?<=[{,])\s*(\w+):", r'"\1":', working, timeout=SEARCH_SECONDS)
    working = regex.sub("\x01(\\d+)\x02", lambda match: json.dumps(strings[int(match[1])]), working)
    try:
        return json.loads(working)
    except ValueError:
        if arguments.get("allow_non_json"):
            return text.strip()
        raise


def _pairs(value: Any) -> Sequence[tuple[str, str]]:
    return [(str(pair[0]), str(pair[1])) for pair in value or () if len(pair) == 2]


def _tags(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for match in arguments["tag_pattern"].finditer(text, timeout=SEARCH_SECONDS):
        key, value = match["key"], _sub_parsed(match["value"] or "", arguments.get("value_parser"))
        if key in found and arguments.get("merge_duplicates"):
            found[key] = [*(found[key] if isinstance(found[key], list) else [found[key]]), value]
        else:
            found[key] = value
    return found


def _key_lines(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for line in text.split(str(arguments.get("line_sep", "\n"))):
        key, separator, value = line.partition(str(arguments.get("kv_sep", ":")))
        if separator:
            found[key.strip()] = _sub_parsed(value.strip(), arguments.get("value_parser"))
    return found
