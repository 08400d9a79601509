"""Names of settings: spelling, aliases, what a source gives under them, and the nearest name for a misspelt one."""

from __future__ import annotations

import difflib
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
    """A half sentence that names what may have been meant: "; did you mean max_num_seqs?", or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
