"""Checks of the fields of which a request may have very many values: in one pass, to the first that is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import MAX_TOKEN_ID, TokenIds
from pagoda.serving.generation import MAX_SEQUENCES_PER_REQUEST
from pagoda.serving.parameters import MAX_PARAMETER_STRINGS

PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"

Prompt = str | list[int] | TokenIds


def prompts(value: object, name: str = "prompt", most: int = MAX_SEQUENCES_PER_REQUEST) -> list[Prompt]:
    """The prompts of a request, one or several, at most `most`: text, or token ids. `name`: of the field, for errors."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, TokenIds):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"{name} must be {PROMPT_FORMS}, and not empty", name)
    if isinstance(value[0], int):
        return [_prompt_ids(value, name)]
    if len(value) > most:
        raise InvalidRequestError(f"{name} has {len(value)} prompts; at most {most} are allowed", name)
    is_text = isinstance(value[0], str)
    if not all(isinstance(entry, str) == is_text for entry in value):
        raise InvalidRequestError(f"{name} must be {PROMPT_FORMS}", name)
    return value if is_text else [_prompt_ids(entry, name) for entry in value]


def _prompt_ids(value: object, name: str) -> list[int] | TokenIds:
    if not isinstance(value, list | TokenIds) or not all_token_ids(value):
        raise InvalidRequestError(
            f"{name} must be {PROMPT_FORMS}, and an id an integer of at most {MAX_TOKEN_ID}, none below 0", name
        )
    if not value:
        raise InvalidRequestError("a prompt of token ids must hold at least one id", name)
    return value


def strings(value: object) -> list[str]:
    """A list of strings."""
    if (
        not isinstance(value, list)
        or len(value) > MAX_PARAMETER_STRINGS
        or not all(type(item) is str for item in value)
    ):
        raise ValueError(f"a list of at most {MAX_PARAMETER_STRINGS} strings is needed, got {shown(value)}")
    return value


def token_ids(value: object) -> list[int] | TokenIds:
    """A list of token ids."""
    if not isinstance(value, list | TokenIds):
        raise ValueError(f"a list of token ids is needed, got {shown(value)}")
    if not all_token_ids(value):
        raise ValueError(f"token ids must be integers from 0 to {MAX_TOKEN_ID}")
    return value


def all_token_ids(values: list[Any] | TokenIds) -> bool:
    """Whether all values may be ids of tokens; an empty list has no other."""
    if isinstance(values, TokenIds) or not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_TOKEN_ID


def mapping(value: object) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError(f"an object is needed, got {shown(value)}")
    return value


def first_error(error: ValidationError) -> tuple[str, str]:
    """Where the first error is, with dots, and what it says, with the value where a value is what is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    found = f", got {shown(first['input'])}" if first["type"].endswith(("_type", "_parsing")) else ""
    return ".".join(str(part) for part in first["loc"])[:200], first["msg"].removeprefix("Value error, ")[:300] + found
