"""What a key may do, and what a route or RPC asks for."""

from __future__ import annotations

from collections.abc import Set
from enum import Enum, StrEnum


class Scope(StrEnum):
    """One right of an API key.

    `infer`: generate, tokenize, look at the model. `read`: metrics and details of health. `admin`: load and unload,
    change settings, put to sleep. None of them includes another.
    """

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


class Access(Enum):
    """What a route or RPC asks of its caller: no key, any known key, or a key with one scope."""

    PUBLIC = None
    ANY_KEY = frozenset(Scope)
    INFER = frozenset({Scope.INFER})
    READ = frozenset({Scope.READ})
    ADMIN = frozenset({Scope.ADMIN})

    def admits(self, scopes: Set[Scope]) -> bool:
        """Whether a caller with these scopes may come in."""
        return self is Access.PUBLIC or not scopes.isdisjoint(self.value)
