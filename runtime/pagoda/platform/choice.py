"""A value that was chosen at start, with the reason that is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIVEN = "as given"


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolved value and why it is so."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value} ({self.reason})"
