"""Typed access to a checkpoint's JSON, with errors that name the file, the key and what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` if it is missing, unreadable, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: a checkpoint directory must hold {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


class ConfigReader:
    """Reads values of a JSON object by type. A key that is absent takes the default; one without a default is required.

    A key whose value is null counts as absent, except for `optional_*`, which tell the two apart where a family does.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, allowed: str) -> CheckpointError:
        """The error for the value of `key`."""
        if self.values.get(key) is None:
            return CheckpointError(f"{self.where}: {key} is missing; it must be {allowed}")
        return CheckpointError(f"{self.where}: {key} must be {allowed}, found {self.values[key]!r}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer of at least `low`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(key, f"an integer of at least {low}")
        return value

    def optional_integer(self, key: str, default: int | None = None, *, low: int = 1) -> int | None:
        """Like `integer`, but null stays None; only an absent key takes the default."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.integer(key, low=low)

    def number(self, key: str, default: float | None = None, *, zero_allowed: bool = False) -> float:
        """A finite number greater than 0, or at least 0 with `zero_allowed`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        allowed = "a number of at least 0" if zero_allowed else "a number greater than 0"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, allowed)
        if value < 0 or (value == 0 and not zero_allowed):
            raise self.error(key, allowed)
        return float(value)

    def optional_number(self, key: str, *, zero_allowed: bool = False) -> float | None:
        """Like `number`; None where the key is absent or null."""
        return None if self.values.get(key) is None else self.number(key, zero_allowed=zero_allowed)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """A non-empty string."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(ids)

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value
