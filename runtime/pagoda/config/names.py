"""Names of settings: spelling, aliases, what a source gives under them, and the nearest name for a misspelt one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pagoda.config.schema import options


@dataclass(frozen=True, slots=True)
class Given:
    """A value as one source gives it.

    `name`: an accepted name, the setting's own or an alias. `raw`: text, or what a file or caller holds. `source`, in words:
    `command line --dtype`, `file /etc/pagoda.yaml`, `environment PAGODA_DTYPE`, `argument`.
    """

    name: str
    raw: Any
    source: str

    @property
    def key(self) -> str:
        """The setting with this name or alias."""
        return settings_by_name()[self.name]


@cache
def settings_by_name() -> dict[str, str]:
    """The setting of each accepted name (with underscores): its own name and its aliases."""
    names = {key: key for key in options()}
    for key, info in options().items():
        names.update(dict.fromkeys(info.aliases, key))
    return names


def normalized(name: str) -> str:
    """`name` with underscores and in lower case: `Max-Model-Len` is `max_model_len`."""
    return name.replace("-", "_").lower()


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names what may have been meant: "; did you mean max_num_seqs?", or nothing.

    Few wrong letters for the length of the name, or all words of it among those of a name with at most one more.
    """
    core, words = _core(name), _words(name)
    names = list(dict.fromkeys(known))
    allowed = 0 if len(core) < 3 else 1 if len(core) <= 5 else 2 if len(core) <= 11 else 3
    distances = {candidate: _distance(core, _core(candidate), allowed) for candidate in names}
    least = min(distances.values(), default=allowed + 1)
    if least <= allowed:
        matches = [candidate for candidate in names if distances[candidate] == least]
    else:
        matches = [
            candidate for candidate in names if words <= _words(candidate) and len(_words(candidate) - words) <= 1
        ]
    if not matches or not words or len(matches) > _MOST_GUESSES:
        return ""
    *others, last = matches
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


_MOST_GUESSES = 3


def _core(name: str) -> str:
    """What of a name tells it from others: without dashes before it and the prefix that all variables have."""
    return normalized(name).lstrip("_").removeprefix("pagoda_")


def _words(name: str) -> frozenset[str]:
    return frozenset(filter(None, re.split(r"[_.]", _core(name))))


def _distance(one: str, other: str, most: int) -> int:
    """Letters that are wrong, missing, too many or swapped with their neighbour; `most + 1` for more than `most`."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, last, row = row, before, [i]
        for j, against in enumerate(other, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != against))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == against:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
