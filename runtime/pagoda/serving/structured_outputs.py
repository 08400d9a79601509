"""What a client asks of the form of an answer, in the names of OpenAI, vLLM, SGLang and llama.cpp, as one `GrammarSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.structured.spec import GrammarSpec, check_length

_Make = Callable[[Any], GrammarSpec]

# vLLM's names inside `structured_outputs`; those before it had the prefix `guided_`.
_CONSTRAINTS: dict[str, _Make] = {
    "json": GrammarSpec.of_json_schema,
    "regex": GrammarSpec.of_regex,
    "choice": GrammarSpec.of_choice,
    "grammar": GrammarSpec.of_grammar,
    "structural_tag": GrammarSpec.of_structural_tag,
}
# At the top of a request: vLLM's old names, SGLang's and llama.cpp's.
_FIELDS: dict[str, str] = {
    **{f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")},
    **{"json_schema": "json", "regex": "regex", "ebnf": "grammar", "grammar": "grammar"},
}
# Of `structured_outputs` and beside `guided_*`: what is read, and what would change the answer and is not there.
_WITHOUT_EFFECT = frozenset({"disable_fallback", "backend", "_backend", "_backend_was_auto"})
_NOT_THERE = ("disable_additional_properties", "whitespace_pattern", "guided_whitespace_pattern")

STRUCTURED_FIELDS = frozenset(
    {"response_format", "structured_outputs", *_FIELDS, "guided_whitespace_pattern", "guided_decoding_backend"}
)


def grammar_of(parameters: Mapping[str, object]) -> GrammarSpec | None:
    """The constraint that `parameters` ask for, or None; every other parameter is left alone.

    Values are objects, or, where a protocol has only scalars, JSON in a string. Raises `InvalidRequestError` for two
    constraints, or one that is wrong, and `NotSupportedError` for what is not there; both name the field.
    """
    found: dict[str, GrammarSpec] = {}
    for name in sorted(STRUCTURED_FIELDS & parameters.keys()):
        value = parameters[name]
        if value is None or name == "guided_decoding_backend":
            continue
        _refuse_missing({name: value})
        spec = _spec_of(name, value)
        if spec is not None:
            found[name] = spec
    if len(found) > 1:
        raise InvalidRequestError(
            f"{' and '.join(found)} exclude each other: an answer has one form", next(iter(found))
        )
    return next(iter(found.values()), None)


def _spec_of(name: str, value: object) -> GrammarSpec | None:
    if name == "response_format":
        return _response_format(_object(name, value))
    if name == "structured_outputs":
        return _structured_outputs(_object(name, value))
    kind = _FIELDS[name]
    if kind == "choice" and isinstance(value, str):
        value = _parsed(name, value)
    return _make(name, _CONSTRAINTS[kind], value)


def _structured_outputs(value: Mapping[str, Any]) -> GrammarSpec | None:
    _refuse_missing(value)
    value = {key: item for key, item in value.items() if item is not None and item is not False}
    whitespace = not value.pop("disable_any_whitespace", False)
    json_object = value.pop("json_object", False)
    names = [name for name in _CONSTRAINTS if name in value]
    unknown = value.keys() - _CONSTRAINTS.keys() - _WITHOUT_EFFECT
    if unknown:
        raise InvalidRequestError(
            f"structured_outputs has {shown(min(unknown))}; known are json_object, {', '.join(_CONSTRAINTS)} and "
            "disable_any_whitespace",
            "structured_outputs",
        )
    if len(names) + bool(json_object) > 1:
        raise InvalidRequestError(
            f"structured_outputs has {' and '.join([*names, *['json_object'] * bool(json_object)])}: an answer has one form",
            "structured_outputs",
        )
    if json_object:
        spec = GrammarSpec.of_json_object()
    elif names:
        spec = _make("structured_outputs", _CONSTRAINTS[names[0]], value[names[0]])
    else:
        return None
    return spec if whitespace else replace(spec, whitespace=False)


def _response_format(value: Mapping[str, Any]) -> GrammarSpec | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec.of_json_object()
    if kind == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping | bool):
            raise InvalidRequestError(
                "response_format of type json_schema needs the schema in json_schema.schema", "response_format"
            )
        return _make("response_format", GrammarSpec.of_json_schema, schema["schema"])
    if kind == "structural_tag":
        return _make("response_format", GrammarSpec.of_structural_tag, value)
    raise InvalidRequestError(
        f"response_format has the type {shown(kind)}; known are text, json_object, json_schema and structural_tag",
        "response_format",
    )


def _make(name: str, make: _Make, value: object) -> GrammarSpec:
    """What `make` makes of the value; an error names the field that the client wrote."""
    try:
        return make(value)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), name) from None


def _refuse_missing(value: Mapping[str, object]) -> None:
    for name in _NOT_THERE:
        if value.get(name) not in (None, False):
            raise NotSupportedError(
                f"{name} is not supported by this server: whitespace in JSON is bounded, see the docs"
            )


def _object(name: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = _parsed(name, value)
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must be an object, got {shown(value)}", name)
    return value


def _parsed(name: str, text: str) -> object:
    check_length(text, name)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidRequestError(f"{name} as a string must be JSON, got {shown(text)}", name) from None
