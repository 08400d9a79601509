"""The types that a tool's JSON schema allows an argument, and text as a value of them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 16


def schema_types(schema: object, depth: int = 0) -> tuple[str, ...]:
    """The names of the types in `schema`, in its order; empty where it says none."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return ()
    declared = schema.get("type")
    types: list[str] = []
    if isinstance(declared, str):
        types.append(declared)
    elif isinstance(declared, list):
        types += [name for name in declared if isinstance(name, str)]
    else:
        for keyword in ("anyOf", "oneOf", "allOf"):
            for choice in schema.get(keyword) or ():
                types += schema_types(choice, depth + 1)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        types += [_type_of(value) for value in values] if isinstance(values, list) else []
    if schema.get("nullable"):
        types.append("null")
    return tuple(dict.fromkeys(types))


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def is_verbatim(types: tuple[str, ...]) -> bool:
    """Whether every text is a value of these types as it stands, so that none of it must be known before the first piece."""
    return not types or types == ("string",)


def coerce(text: str, types: tuple[str, ...]) -> Any:
    """`text` as the first of `types` that it can be, in the order of precedence null, boolean, number, structure, string.

    Without types it is JSON; what fits none stays the text that it is.
    """
    stripped = text.strip()
    if not types:
        return _structure(stripped, (bool, int, float, list, dict, str), text)
    for name in _PRECEDENCE:
        if name not in types:
            continue
        match name:
            case "null" if stripped in ("null", "None"):
                return None
            case "boolean" if stripped.lower() in ("true", "false"):
                return stripped.lower() == "true"
            case "integer" | "number":
                number = _number(stripped)
                if number is not None and (name == "number" or isinstance(number, int)):
                    return number
            case "object" | "array":
                value = _structure(stripped, (dict,) if name == "object" else (list,), None)
                if value is not None:
                    return value
    return text


_PRECEDENCE = ("null", "boolean", "integer", "number", "object", "array")


def _number(text: str) -> int | float | None:
    try:
        if len(text) > 400 or "_" in text:
            return None
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and "e" not in text.lower() and text.rstrip("0").endswith(".") else number


def _structure(text: str, kinds: tuple[type, ...], default: Any) -> Any:
    """`text` as JSON, or as the Python literal that models write instead, if it is one of `kinds`."""
    for read in (json.loads, ast.literal_eval):
        if read is ast.literal_eval and (len(text) > 1 << 16 or text[:1] not in ("{", "[")):
            break
        try:
            value = read(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, kinds) or value is None:
            return value
    return default
