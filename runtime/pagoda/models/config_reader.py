"""Typed access to a checkpoint's JSON, with errors that name the file, the key, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30
MAX_TOKEN_IDS = 1024
MAX_NUMBERS = 4096


class ConfigReader:
    """Reads values of a JSON object by type. A key that is absent takes the default; one without a default is required.

    A key whose value is null counts as absent, except for `optional_*`, which distinguish the two.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, allowed: str) -> CheckpointError:
        """The error for the value of `key`."""
        if self.values.get(key) is None:
            return CheckpointError(f"{self.where}: {key} is missing; it must be {allowed}")
        return CheckpointError(f"{self.where}: {key} must be {allowed}, found {shown(self.values[key])}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER) -> int:
        """An integer from `low` to `high`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer of at least {low} and at most {high}")
        return value

    def optional_integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER
    ) -> int | None:
        """Like `integer`, but null stays None; only an absent key takes the default."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.integer(key, low=low, high=high)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        low: float = 0.0,
        high: float = MAX_NUMBER,
        low_allowed: bool = False,
    ) -> float:
        """A number greater than `low`, or at least that with `low_allowed`, and at most `high`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN is in no range.
        if not is_number or not low <= value <= high or (value == low and not low_allowed):  # type: ignore[operator]
            above = "of at least" if low_allowed else "greater than"
            raise self.error(key, f"a number {above} {low:g} and at most {high:g}")
        return float(value)  # type: ignore[arg-type]

    def optional_number(
        self, key: str, *, low: float = 0.0, high: float = MAX_NUMBER, low_allowed: bool = False
    ) -> float | None:
        """Like `number`; None where the key is absent or null."""
        if self.values.get(key) is None:
            return None
        return self.number(key, low=low, high=high, low_allowed=low_allowed)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def optional_flag(self, key: str) -> bool | None:
        return None if self.values.get(key) is None else self.flag(key, False)

    def string(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string")
        return value

    def whole_number(self, key: str, *, low: int) -> int | None:
        """An integer of at least `low`, or a float that is one (`50.0`); None where the key is absent or null."""
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer() and low <= value <= MAX_INTEGER:
            return int(value)
        return self.optional_integer(key, low=low)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where the key is absent or null. -1 means "none", and is left out."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_TOKEN_IDS or not all(type(token) is int and -1 <= token <= MAX_INTEGER for token in ids):
            raise self.error(
                key, f"a token id of at least -1 and at most {MAX_INTEGER}, or a list of up to {MAX_TOKEN_IDS} of them"
            )
        return tuple(token for token in ids if token >= 0)

    def numbers(self, key: str, *, low: float, high: float) -> tuple[float, ...]:
        """A list of up to `MAX_NUMBERS` numbers, each from `low` to `high`."""
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or not 0 < len(value) <= MAX_NUMBERS
            or not all(
                isinstance(item, int | float) and not isinstance(item, bool) and low <= item <= high for item in value
            )
        ):
            raise self.error(key, f"a list of up to {MAX_NUMBERS} numbers of at least {low:g} and at most {high:g}")
        return tuple(map(float, value))

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value
