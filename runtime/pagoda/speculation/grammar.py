"""Drafts of what a structured output leaves no choice about: keys, separators, the beginnings of tool calls.

llguidance calls these fast-forward tokens, SGLang jumps forward over them. Here they are drafts like any other, verified in a
step: so the output is the one without them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.scheduling.request import Request


class GrammarDrafter:
    """The forced tokens of a request that has a constraint."""

    def __init__(self, request: Request) -> None:
        self._constraint = request.constraint

    def close(self) -> None:
        pass

    def propose(self, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that come next."""
        return [] if self._constraint is None else self._constraint.forced_tokens()[:limit]
