"""The tools that a request offers, as the parsers of calls need them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The JSON schemas of the parameters of the tools that may be called, by name.

    `parallel`: the answer may have several calls; else it ends with the first one.
    """

    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel: bool = True

    def properties(self, name: str) -> Mapping[str, Any]:
        """The schemas of a tool's arguments by name, references to definitions resolved one level deep."""
        schema = self.parameters.get(name) or {}
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return {}
        return {key: _resolved(value, schema) for key, value in properties.items()}


def _resolved(value: object, schema: Mapping[str, Any]) -> object:
    reference = value.get("$ref") if isinstance(value, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return value
    target: object = schema
    for part in reference[2:].split("/"):
        target = target.get(part) if isinstance(target, Mapping) else None
    return target


def make_call_id(characters: int | None = None) -> str:
    """A new id for a call, of `characters` letters and digits where a chat template insists."""
    return uuid.uuid4().hex[:characters] if characters else f"call_{uuid.uuid4().hex[:24]}"
