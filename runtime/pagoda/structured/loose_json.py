"""Grammars of objects whose keys stand without quotes and whose strings stand between two marks, as Gemma writes arguments.

llguidance knows JSON only, so the rules of a schema are written here, for the keywords below; any other is refused by name.
Objects with `properties` have these, in their order, and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagoda.errors import InvalidRequestError, shown

AddRule = Callable[[str], str]
"""Adds a rule with this body to the grammar, and gives its name."""
Define = Callable[[Callable[[str], str]], str]
"""The same for a rule whose body may name the rule: it is written by what is given, which gets the name."""

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_OF_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_KEPT = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": _OF_NUMBERS,
    "integer": _OF_NUMBERS,
}
_ALTERNATIVES = ("anyOf", "oneOf")
_WITHOUT_EFFECT = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
        *("$defs", "definitions", "type", "enum", "const", *_ALTERNATIVES, "$ref"),
    }
)
_BARE_KEY = re.compile(r"[^\s:{}\[\],\"<>]+")
_ANY = "any"


class LooseJsonWriter:
    """Writes the rules of one schema. `quote`: the expression of the mark around strings, `text`: of a string and the mark
    behind it. `json`: of what JSON has under a schema.

    Raises `InvalidRequestError` that names the keyword which cannot be enforced.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | bool,
        quote: str,
        text: str,
        json: Callable[[Any], str],
        add: AddRule,
        define: Define,
    ) -> None:
        self._root = schema if isinstance(schema, Mapping) else {}
        self._quote, self._text, self._json, self._add, self._define = quote, text, json, add, define
        self._rules: dict[str, str] = {}  # of references, and of any value

    def object(self) -> str:
        """The expression of the schema, which is one of objects."""
        return self._of({"type": "object", **self._root})

    def _of(self, schema: Any) -> str:
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            raise _refused("a schema that is false, or none")
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        for name in _ALTERNATIVES:
            if name in schema:
                if not isinstance(schema[name], Sequence) or not schema[name]:
                    raise _refused(f"{name} without alternatives")
                return self._choice([self._of(each) for each in schema[name]])
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._choice([self._value(value) for value in values])
        types = schema.get("type", list(_TYPES) if schema.keys() - _WITHOUT_EFFECT else _ANY)
        if types == _ANY:
            return self._any()
        types = [types] if isinstance(types, str) else types
        unknown = schema.keys() - _WITHOUT_EFFECT - frozenset().union(*(_KEPT.get(each, ()) for each in types))
        if unknown:
            raise _refused(min(unknown))
        return self._choice([self._typed(each, schema) for each in types])

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema)
            case "number" | "integer" | "boolean" | "null":
                kept = {name: value for name, value in schema.items() if name in _KEPT.get(kind, ())}
                return self._json({"type": kind, **kept})
        raise _refused(f"type {shown(kind)}")

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        if not properties:
            values = schema.get("additionalProperties", True)
            if values is False:
                return '"{" "}"'
            entry = self._add(f'/{_BARE_KEY.pattern[:-1]}+/ ":" {self._of(values)}')
            return self._add(f'"{{" ({entry} ("," {entry})*)? "}}"')
        missing = [name for name in required if name not in properties]
        if missing:
            raise _refused(f"required {shown(missing[0])}, which is not in properties")
        entries = []
        for key, value in properties.items():
            if not _BARE_KEY.fullmatch(key):
                raise _refused(f"the key {shown(key)}")
            entries.append((self._add(f"{_literal(key + ':')} {self._of(value)}"), key in required))
        return self._add(f'"{{" {separated(entries, _literal(","), self._add)} "}}"')

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._add(self._of(schema.get("items", True)))
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        more = f'("," {item}){{{max(0, least - 1)},{"" if most is None else int(most) - 1}}}'
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        if "minLength" not in schema and "maxLength" not in schema:
            return f"{self._quote} {self._text}"
        bounds = f"{{{int(schema.get('minLength', 0))},{schema.get('maxLength', '')}}}"
        return f"{self._quote} /[^<]{bounds}/ {self._quote}"

    def _value(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, Mapping | list):
            raise _refused("an enum of objects or lists")
        return _literal(json.dumps(value))

    def _referred(self, reference: Any) -> str:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _refused(f"$ref {shown(reference)}")
        if reference not in self._rules:
            target: Any = self._root
            for part in filter(None, reference[1:].split("/")):
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
            if target is None:
                raise _refused(f"$ref {shown(reference)}, which is not there")
            return self._recursive(reference, lambda: self._of(target))
        return self._rules[reference]

    def _any(self) -> str:
        if _ANY not in self._rules:
            return self._recursive(_ANY, lambda: self._choice([self._typed(kind, {"type": kind}) for kind in _TYPES]))
        return self._rules[_ANY]

    def _recursive(self, key: str, body: Callable[[], str]) -> str:
        def write(name: str) -> str:
            self._rules[key] = name
            return body()

        return self._define(write)

    def _choice(self, alternatives: Sequence[str]) -> str:
        return alternatives[0] if len(alternatives) == 1 else self._add(" | ".join(dict.fromkeys(alternatives)))


def separated(elements: Sequence[tuple[str, bool]], separator: str, add: AddRule) -> str:
    """The expression of elements in their order, each required or not, with a separator between those that are there."""
    head, tail = "", ""
    for element, is_required in reversed(elements):
        whole = f"{element} {tail}".strip()
        if is_required:
            head = add(whole)
            tail = add(f"{separator} {whole}")
        else:
            head = add(f"{whole} | {head}" if head else f"({whole})?")
            tail = add(f"({separator} {element})? {tail}".strip())
    return head


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refused(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{what} cannot be enforced in the format of this model's tool calls", "tools")
