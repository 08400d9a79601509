"""What was found: what is wrong or slow, what shows it, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """The worse, the smaller. `ERROR`: requests are refused; `WARNING`: they are slow, or fewer are served."""

    ERROR = 0
    WARNING = 1
    NOTE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`code`: its name for scripts. `subject`: whose it is, such as `model demo`. `seen`: the evidence, with figures."""

    code: str
    severity: Severity
    subject: str
    what: str
    seen: tuple[str, ...] = ()
    advice: str = ""

    def as_lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.severity.name:<7} {self.subject}: {self.what}"]
        lines += [f"        seen: {one}" for one in self.seen]
        return [*lines, f"        do:   {self.advice}"] if self.advice else lines
