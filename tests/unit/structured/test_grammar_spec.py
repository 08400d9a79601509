"""What may be asked of the form of an answer, before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.serving.structured_outputs import grammar_of
from pagoda.structured.spec import MAX_SOURCE_BYTES, GrammarSpec

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"enum": [None, 1]}}}
SPEC = GrammarSpec.of_json_schema(SCHEMA)
TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}


def test_properties_keep_their_order() -> None:
    assert list(json.loads(SPEC.source)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None, "temperature": 0.5}, None),
        ({"structured_outputs": {}}, None),
        ({"guided_decoding_backend": "xgrammar"}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec.of_json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            SPEC,
        ),
        ({"response_format": json.dumps({"type": "json_schema", "json_schema": {"schema": SCHEMA}})}, SPEC),
        (
            {"response_format": {"type": "structural_tag", **TAG}},
            GrammarSpec.of_structural_tag({"type": "structural_tag", **TAG}),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, SPEC),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, SPEC),
        ({"structured_outputs": json.dumps({"json": SCHEMA})}, SPEC),
        (
            {
                "structured_outputs": {
                    "json": SCHEMA,
                    "disable_any_whitespace": True,
                    "regex": None,
                    "json_object": False,
                }
            },
            GrammarSpec(kind="json_schema", source=SPEC.source, whitespace=False),
        ),
        ({"structured_outputs": {"json_object": True}}, GrammarSpec.of_json_object()),
        ({"structured_outputs": {"regex": "a+"}}, GrammarSpec.of_regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, GrammarSpec.of_choice(["a", "b"])),
        ({"structured_outputs": {"grammar": "start: A"}}, GrammarSpec.of_grammar("start: A")),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, GrammarSpec.of_structural_tag(TAG)),
        ({"guided_json": SCHEMA}, SPEC),
        ({"guided_json": json.dumps(SCHEMA)}, SPEC),
        ({"guided_regex": "a+"}, GrammarSpec.of_regex("a+")),
        ({"guided_choice": ["a", "b"]}, GrammarSpec.of_choice(["a", "b"])),
        ({"guided_choice": '["a", "b"]'}, GrammarSpec.of_choice(["a", "b"])),
        ({"guided_grammar": "start: A"}, GrammarSpec.of_grammar("start: A")),
        ({"json_schema": json.dumps(SCHEMA)}, SPEC),
        ({"regex": "a+"}, GrammarSpec.of_regex("a+")),
        ({"ebnf": 'root ::= "a"'}, GrammarSpec.of_grammar('root ::= "a"')),
        ({"grammar": 'root ::= "a"'}, GrammarSpec.of_grammar('root ::= "a"')),
    ],
)
def test_all_spellings_give_one_record(parameters: dict[str, Any], expected: GrammarSpec | None) -> None:
    assert grammar_of(parameters) == expected


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format", "known are text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": "no JSON"}, "response_format", "must be JSON"),
        ({"response_format": [1]}, "response_format", "must be an object"),
        ({"structured_outputs": {"yaml": "x"}}, "structured_outputs", "known are json_object"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "json and regex"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs", "an object or a boolean"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"guided_regex": ""}, "guided_regex", "empty"),
        ({"guided_regex": 5}, "guided_regex", "must be a string"),
        ({"guided_choice": []}, "guided_choice", "1 to 1000"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "not empty"),
        ({"guided_choice": "a"}, "guided_choice", "must be JSON"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": {"enum": ["x" * MAX_SOURCE_BYTES]}}, "guided_json", "too large"),
        ({"guided_json": {"const": 10**500}}, "guided_json", "400 digits"),
        ({"guided_json": {"const": float("nan")}}, "guided_json", "no JSON value"),
        ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", "half a character"),
        ({"guided_regex": "a\ud800"}, "guided_regex", "half a character"),
    ],
)
def test_what_is_wrong_is_named(parameters: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        grammar_of(parameters)
    assert refused.value.param == param
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "parameters",
    [
        {"guided_whitespace_pattern": "[ ]*"},
        {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
    ],
)
def test_what_would_change_the_answer_and_is_not_there_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError, match="not supported"):
        grammar_of(parameters)


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: GrammarSpec.of_json_schema(nested(100)),
        lambda: GrammarSpec.of_json_schema('{"items":' * 3000 + "{}" + "}" * 3000),
        lambda: GrammarSpec.of_json_schema({"enum": list(range(10_000_000))}),
    ],
)
def test_a_schema_of_any_size_is_refused_before_it_is_gone_through(make: Callable[[], GrammarSpec]) -> None:
    with pytest.raises(InvalidRequestError):
        make()
