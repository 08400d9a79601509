"""JSON schemas that others wrote, by name, and whether a text is valid under one.

The schemas of the JSON Schema Test Suite (drafts 7 and 2020-12, of json-schema-org on GitHub, MIT, json_schemas/LICENSE) lie
beside this file; those of Kubernetes and of OpenAI's API come with packages that tests need anyway.
"""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic

Schemas = dict[str, dict[str, Any] | bool]

# Where the judge is wrong: it divides floats, and Python's expressions know no \p.
_NOT_JUDGED = ("multipleOf: by small number", "non-ASCII digits")
_MAX_CHARACTERS = 20_000


@cache
def test_suite() -> Schemas:
    """Some 700 small schemas, one for each corner of the specification. Those of draft 7 say so."""
    path = Path(__file__).parent / "json_schemas" / "json_schema_test_suite.json"
    schemas: Schemas = {}
    for name, schema in json.loads(path.read_text(encoding="utf-8")):
        if name.endswith(_NOT_JUDGED):
            continue
        if name.startswith("draft7") and isinstance(schema, dict):
            schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
        schemas[name] = schema
    return schemas


@cache
def kubernetes_objects() -> Schemas:
    """Parts of Kubernetes' API, each with the definitions that it refers to."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.31.0-local"
    document = (folder / "_definitions.json").read_text(encoding="utf-8")
    definitions = json.loads(re.sub(r'"\$ref": *"[^"#]*#', '"$ref": "#', document))["$defs"]
    schemas: Schemas = {}
    for name in sorted(definitions):
        needed, left = {}, [name]
        while left:
            each = left.pop()
            if each not in needed:
                needed[each] = definitions[each]
                left += re.findall(r'"#/\$defs/([^"]+)"', json.dumps(definitions[each]))
        schema = {"$ref": f"#/$defs/{name}", "$defs": needed}
        if len(json.dumps(schema)) < _MAX_CHARACTERS:
            schemas[name] = schema
    return schemas


@cache
def openai_objects() -> Schemas:
    """Objects of OpenAI's API, as pydantic describes them."""
    import openai.types
    import openai.types.chat
    import openai.types.responses

    schemas: Schemas = {}
    for module in (openai.types, openai.types.chat, openai.types.responses):
        for name, value in sorted(vars(module).items()):
            if inspect.isclass(value) and issubclass(value, pydantic.BaseModel):
                try:
                    schema = value.model_json_schema()
                except pydantic.errors.PydanticUserError:
                    continue
                if len(json.dumps(schema)) < _MAX_CHARACTERS:
                    schemas[f"{module.__name__}.{name}"] = schema
    return schemas


def all_schemas() -> Schemas:
    return {**test_suite(), **kubernetes_objects(), **openai_objects()}


def error_of(schema: dict[str, Any] | bool, text: str) -> str | None:
    """Why `text` is not valid under `schema`; None where it is."""
    kind = jsonschema.Draft202012Validator
    if isinstance(schema, dict):
        kind = jsonschema.validators.validator_for(schema, default=kind)
    try:
        kind(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
    except (jsonschema.ValidationError, ValueError) as error:
        return f"{text[:200]!r}: {str(error).splitlines()[0]}"
    return None
