"""How LoRA adapters are named: `name=path`, or vLLM's JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_NAME_CHARACTERS = 256
_KEYS = ("name", "path", "base_model_name")


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter: what requests call it, and its directory. `base_model_name`: the model that it is for, if said."""

    name: str
    path: str
    base_model_name: str | None = None


def parse_lora_module(text: str) -> LoraModule:
    """`name=path`, or `{"name": …, "path": …, "base_model_name": …}`. Raises `ValueError` saying what is allowed."""
    if text.lstrip().startswith("{"):
        try:
            return lora_module_of(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON: {error}") from error
    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError('must be name=path, or a JSON object such as {"name": "sql", "path": "/adapters/sql"}')
    return lora_module_of({"name": name.strip(), "path": path.strip()})


def lora_module_of(value: Any) -> LoraModule:
    """The same of a parsed object."""
    if not isinstance(value, Mapping) or not set(value) <= set(_KEYS) or not {"name", "path"} <= set(value):
        raise ValueError(f"must be an object with name and path, and at most {', '.join(_KEYS)}")
    check_adapter_name(value["name"])
    if not isinstance(value["path"], str) or not value["path"] or "\0" in value["path"]:
        raise ValueError("path must be a directory")
    base = value.get("base_model_name")
    if base is not None and not isinstance(base, str):
        raise ValueError("base_model_name must be a string")
    return LoraModule(value["name"], value["path"], base)


def check_adapter_name(name: object) -> None:
    """Raise `ValueError` for what cannot be the name of an adapter."""
    is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable() and " " not in name
    if not is_name:
        raise ValueError(f"the name must have 1 to {MAX_NAME_CHARACTERS} visible characters without spaces")
