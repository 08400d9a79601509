"""Structural tags to Lark: free text in which tags open parts that keep to schemas, as tool calls do.

Two forms are read, which vLLM and SGLang read too: the older `{"structures": [{"begin", "schema", "end"}], "triggers":
[...]}`, and xgrammar's `{"format": {"type": ...}}` with the types in `_FORMATS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import llguidance

from pagoda.errors import InvalidRequestError, shown
from pagoda.structured.loose_json import LooseJsonWriter, separated

_TEXT = "TEXT"
_ANYTHING = r"/(.|\n)*/"
_FIRST_LINES = f"{_TEXT}: {_ANYTHING}"
_MAX_RULES = 2000


def lark_of_structural_tag(
    tag: Mapping[str, Any], special_tokens: Mapping[str, int], json_options: Mapping[str, Any]
) -> str:
    """The Lark grammar of a structural tag. `special_tokens`: texts of the tokens that stand for themselves in it.

    Raises `InvalidRequestError` that names what is missing, or is of a type that is not read.
    """
    writer = _Writer(special_tokens, json_options)
    if "structures" in tag:
        start = writer.triggered(_from_structures(tag))
    else:
        start = writer.expression(_member(tag, "format", Mapping, "structural_tag"))
    return "\n".join([f"start: {start}", _FIRST_LINES, *writer.rules])


def _from_structures(tag: Mapping[str, Any]) -> dict[str, Any]:
    structures = _member(tag, "structures", list, "structural_tag")
    return {
        "triggers": _member(tag, "triggers", list, "structural_tag"),
        "tags": [
            {
                "begin": _member(each, "begin", str, "structures"),
                "content": {"type": "json_schema", "json_schema": each.get("schema", {})},
                "end": _member(each, "end", str, "structures"),
            }
            for each in structures
        ],
    }


def _member(value: object, name: str, kind: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(f"{where} has a value that is no object")
    if name not in value:
        raise _wrong(f"{where} has no {name!r}")
    if not isinstance(value[name], kind):
        raise _wrong(f"{name!r} in {where} has the wrong type, {type(value[name]).__name__}")
    return value[name]


def _check_keys(part: Mapping[str, Any], kind: str) -> None:
    """Refuse what is not read, unless it asks for nothing; xgrammar writes its defaults, too."""
    defaults = {"style": "json", "type": kind}
    for key, value in part.items():
        if key not in _KEYS[kind] and value not in (None, [], "", False) and value != defaults.get(key):
            raise _wrong(f"{shown(key)} of a {kind} cannot be enforced: it is not known here")


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, "structural_tag")


class _Writer:
    """Collects the rules of a grammar; its methods give the expression for a part of the tag."""

    def __init__(self, special_tokens: Mapping[str, int], json_options: Mapping[str, Any]) -> None:
        self._special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
        self._special_ids = special_tokens
        self._json_options = json_options
        self.rules: list[str] = []

    def expression(self, part: Mapping[str, Any]) -> str:
        """The expression of a format, by its type."""
        kind = _member(part, "type", str, "a format")
        write = _FORMATS.get(kind)
        if write is None:
            raise _wrong(f"a format has the type {shown(kind)}; known types are {', '.join(sorted(_FORMATS))}")
        _check_keys(part, kind)
        return write(self, part)

    def literal(self, text: str) -> str:
        """A text, in which special tokens stand for themselves."""
        pieces, end = [], 0
        for match in self._special.finditer(text):
            pieces += [json.dumps(text[end : match.start()], ensure_ascii=False)] if match.start() > end else []
            pieces.append(_token_reference(match[0], self._special_ids[match[0]]))
            end = match.end()
        if end < len(text):
            pieces.append(json.dumps(text[end:], ensure_ascii=False))
        return " ".join(pieces)

    def json(self, schema: object) -> str:
        """An expression for what is valid under a schema."""
        if not isinstance(schema, Mapping | bool):
            raise _wrong(f"a schema has the wrong type, {type(schema).__name__}")
        return self._rule(f"%json {json_source(schema, self._json_options)}")

    def tag(self, part: Mapping[str, Any], begin_after: str = "") -> str:
        """A tag, whose `begin` is there as far as `begin_after`."""
        _check_keys(part, "tag")
        begin = _member(part, "begin", str, "a tag")[len(begin_after) :]
        content = _member(part, "content", Mapping, "a tag")
        ends = part.get("end", "")
        ends = ends if isinstance(ends, list) else [ends]
        if not ends or not all(isinstance(end, str) for end in ends):
            raise _wrong("'end' in a tag must be a text or a list of texts")
        special = self._special.search(ends[0]) if len(ends) == 1 else None
        if content.get("type") == "any_text" and special is not None and special.start():
            end = ends[0][: special.start()]
            return _sequence(self.literal(begin), self._up_to(end), self.literal(ends[0][special.start() :]))
        if content.get("type") == "any_text" and not any(self._special.match(end) for end in ends) and all(ends):
            name = f"TEXT_{len(self.rules)}"
            choices = " | ".join(json.dumps(end, ensure_ascii=False) for end in ends)
            self._add(f"{name.lower()}[lazy]: {_TEXT} ({choices})")
            return _sequence(self.literal(begin), name.lower())
        end_choice = " | ".join(self.literal(end) for end in ends)
        return _sequence(
            self.literal(begin), self.expression(content), f"({end_choice})" if len(ends) > 1 else end_choice
        )

    def triggered(self, part: Mapping[str, Any]) -> str:
        """Free text, in which a trigger must be the beginning of one of the tags."""
        triggers, tags = (
            _member(part, "triggers", list, "triggered_tags"),
            _member(part, "tags", list, "triggered_tags"),
        )
        if not triggers or not tags or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise _wrong("triggered tags need triggers, which are texts that are not empty, and tags")
        alternatives = []
        left = {id(tag): _member(tag, "begin", str, "a tag") for tag in tags}
        for trigger in triggers:
            own = [tag for tag in tags if left.get(id(tag), "").startswith(trigger)]
            if not own:
                raise _wrong(f"no tag begins with the trigger {trigger[:80]!r}")
            choices = " | ".join(self._rule(self.tag(tag, begin_after=trigger) or '""') for tag in own)
            for tag in own:
                del left[id(tag)]
            alternatives.append(self._rule(f"{self._up_to(trigger)} ({choices})"))
        if left:
            raise _wrong(f"no trigger begins the tag {next(iter(left.values()))[:80]!r}")
        one = " | ".join(alternatives)
        at_least_one, only_one = bool(part.get("at_least_one")), bool(part.get("stop_after_first"))
        if only_one:
            return f"({one})" if at_least_one else f"({one} | {_TEXT})"
        return f"({one}){'+' if at_least_one else '*'} {_TEXT}"

    def separated(self, part: Mapping[str, Any]) -> str:
        """Tags with a separator between them and nothing else."""
        tags = _member(part, "tags", list, "tags_with_separator")
        separator = self.literal(_member(part, "separator", str, "tags_with_separator"))
        one = self._rule(" | ".join(self._rule(self.tag(tag)) for tag in tags))
        several = one if part.get("stop_after_first") else f"{one} ({separator} {one})*"
        return several if part.get("at_least_one") else f"({several})?"

    def sequence(self, part: Mapping[str, Any]) -> str:
        """Formats one after another."""
        return _sequence(*map(self.expression, _member(part, "elements", list, "sequence")))

    def separated_sequence(self, part: Mapping[str, Any]) -> str:
        """Formats in their order with a separator between them; those whose numbers are in `optional` may be left out."""
        elements = _member(part, "elements", list, "separated_sequence")
        separator = self.literal(_member(part, "separator", str, "separated_sequence"))
        optional = part.get("optional", ())
        rules = [(self._rule(self.expression(each)), number not in optional) for number, each in enumerate(elements)]
        return separated(rules, separator, self._rule)

    def loose_json(self, part: Mapping[str, Any]) -> str:
        """An object as Gemma writes it."""
        quote = _member(part, "quote", str, "loose_json")
        schema = _member(part, "json_schema", Mapping | bool, "loose_json")
        return LooseJsonWriter(
            schema, self.literal(quote), self._up_to(quote), self.json, self._rule, self._defined
        ).object()

    def choice(self, part: Mapping[str, Any]) -> str:
        """One of several formats."""
        return f"({' | '.join(map(self.expression, _member(part, 'elements', list, 'or')))})"

    def regex(self, part: Mapping[str, Any]) -> str:
        """What a regular expression matches."""
        return self._rule(f"/{llguidance.regex_to_lark(_member(part, 'pattern', str, 'regex'), '')}/")

    def other_text(self, part: Mapping[str, Any]) -> str:
        """Free text that does not begin as `pattern` says, up to and with `end` where there is one."""
        begin = llguidance.regex_to_lark(_member(part, "pattern", str, "other_text"), "")
        name = f"OTHER_{len(self.rules)}"
        self._add(f"{name}: {_ANYTHING} & ~/({begin})(.|\\n)*/")
        end = part.get("end", "")
        return self._up_to(end, name) if end else name

    def _up_to(self, trigger: str, text: str = _TEXT) -> str:
        """Free text that ends where the trigger does."""
        special = self._special.match(trigger)
        if special is not None:
            return _sequence(text, self.literal(trigger))
        name = f"trigger_{len(self.rules)}"
        self._add(f"{name}[lazy]: {text} {json.dumps(trigger, ensure_ascii=False)}")
        return name

    def _defined(self, write: Callable[[str], str]) -> str:
        """A rule that may name itself."""
        place = len(self.rules)
        name = self._rule("")
        self.rules[place] = f"{name}: {write(name)}"
        return name

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self.rules)}"
        self._add(f"{name}: {body}")
        return name

    def _add(self, rule: str) -> None:
        if len(self.rules) >= _MAX_RULES:
            raise _wrong(f"structural_tag has more than {_MAX_RULES} parts")
        self.rules.append(rule)


def json_source(schema: Mapping[str, Any] | bool, json_options: Mapping[str, Any]) -> str:
    """A schema as llguidance reads it, with its options: what the client says of them itself does not count."""
    if schema is False:
        raise InvalidRequestError("json_schema is false: no answer is valid under it", "json_schema")
    members = {} if schema is True else _with_exact_bounds(schema)
    return json.dumps({**members, "x-guidance": dict(json_options)}, ensure_ascii=False, separators=(",", ":"))


def _with_exact_bounds(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with bounds of numbers that are held: llguidance rounds those beyond `_LARGEST_EXACT`, and an answer just
    outside of them would be allowed. A range is narrowed, which allows nothing that the schema does not.
    """
    held: dict[str, Any] = {}
    for name, value in schema.items():
        sign = _BOUNDS.get(name)
        if sign is not None and isinstance(value, int | float) and not isinstance(value, bool):
            if sign * value > _LARGEST_EXACT:
                raise InvalidRequestError(
                    f"json_schema cannot be enforced: {name} {shown(value)} leaves only numbers beyond "
                    f"{sign * _LARGEST_EXACT}, which are not exact",
                    "json_schema",
                )
            value = sign * max(sign * value, -_LARGEST_EXACT)
        elif name not in _NO_SCHEMAS:
            value = _held(value)
        held[name] = value
    return held


def _held(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _with_exact_bounds(value)
    return [_held(item) for item in value] if isinstance(value, list) else value


# Of integers that are floating-point numbers, too; and to which side each bound leaves room.
_LARGEST_EXACT = 2**53 - 1
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_NO_SCHEMAS = frozenset({"const", "enum", "default", "examples"})


def _token_reference(token: str, token_id: int) -> str:
    return token if re.fullmatch(r"<[^<>\s]+>", token) else f"<[{token_id}]>"


def _sequence(*parts: str) -> str:
    return " ".join(part for part in parts if part)


_FORMATS: dict[str, Callable[[_Writer, Mapping[str, Any]], str]] = {
    "any_text": lambda _, __: _TEXT,
    "const_string": lambda writer, part: writer.literal(_member(part, "value", str, "const_string")),
    "json_schema": lambda writer, part: writer.json(_member(part, "json_schema", Mapping | bool, "json_schema")),
    "loose_json": _Writer.loose_json,
    "or": _Writer.choice,
    "other_text": _Writer.other_text,
    "regex": _Writer.regex,
    "separated_sequence": _Writer.separated_sequence,
    "sequence": _Writer.sequence,
    "tag": lambda writer, part: writer.tag(part),
    "tags_with_separator": _Writer.separated,
    "triggered_tags": _Writer.triggered,
}
# What each has beside its type. Anything else would be asked for and not be kept.
_KEYS: dict[str, frozenset[str]] = {
    "any_text": frozenset(),
    "const_string": frozenset({"value"}),
    "json_schema": frozenset({"json_schema"}),
    "loose_json": frozenset({"json_schema", "quote"}),
    "or": frozenset({"elements"}),
    "other_text": frozenset({"pattern", "end"}),
    "regex": frozenset({"pattern"}),
    "separated_sequence": frozenset({"elements", "separator", "optional"}),
    "sequence": frozenset({"elements"}),
    "tag": frozenset({"begin", "content", "end"}),
    "tags_with_separator": frozenset({"tags", "separator", "at_least_one", "stop_after_first"}),
    "triggered_tags": frozenset({"triggers", "tags", "at_least_one", "stop_after_first"}),
}
