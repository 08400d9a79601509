"""Where the last tokens stood before: a text with an index of its n-grams, as in deflate (RFC 1951), section 4.

    tokens      7  3  9  4  1  …  3  9  4  8  …  3  9  4          n = 3: the key (3, 9, 4)
    latest                               │                        its newest place but the last one
    previous             ◀───────────────┘                        and the one before, linked

A token costs one entry, whatever the length of the text, and a look-up visits a bounded number of places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BREAK = -1
"""No token: between texts that do not continue each other."""

# Tokens indexed in one go, some milliseconds: a step must not wait for a long prompt.
_INDEXED_AT_ONCE = 8192

MOST_INDEXED = 1 << 20
"""Tokens that the indexes of all running requests may have together: some 200 MB."""


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens stood in `tokens` before: `follows` is the index of what came next."""

    tokens: list[int]
    follows: int
    length: int


class IndexBudget:
    """How many tokens more may be indexed by those that share it."""

    def __init__(self, num_tokens: int = MOST_INDEXED) -> None:
        self.left = num_tokens


class History:
    """A growing text. `n`: the fewest tokens that must be equal."""

    def __init__(self, n: int, budget: IndexBudget | None = None) -> None:
        """`budget`: that its index takes from; None: the owner sees to it that the text has a bound."""
        self.n = n
        self._budget = budget or IndexBudget()
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._previous: list[
            int
        ] = []  # of each index at which an n-gram ends, where the same one ended before; else -1

    def append(self, tokens: Sequence[int]) -> None:
        """Let the text grow."""
        self.tokens.extend(tokens)

    def index(self) -> bool:
        """Index what has been appended, or a part of it; whether all of it is indexed, which it is not without a budget.

        The n-gram that ends with the last token is not: nothing follows it yet.
        """
        tokens, n, latest, previous = self.tokens, self.n, self._latest, self._previous
        first = len(previous)
        last = min(len(tokens) - 1, first + min(_INDEXED_AT_ONCE, self._budget.left))
        self._budget.left -= max(0, last - first)
        for end in range(first, last):
            key = tuple(tokens[max(0, end - n + 1) : end + 1])
            previous.append(latest.get(key, -1))
            latest[key] = end
        return last >= len(tokens) - 1

    def release(self) -> None:
        """Forget the index, and give back what it took of the budget."""
        self._budget.left += len(self._previous)
        self._latest, self._previous = {}, []

    def find(self, suffix: list[int], longest: int, most: int) -> list[Match]:
        """Up to `most` places in the text where the last tokens of `suffix` stood, the newest first.

        At least `n` tokens are equal; up to `longest` are compared.
        """
        n = self.n
        if len(suffix) < n:
            return []
        tokens = self.tokens
        end = self._latest.get(tuple(suffix[-n:]), -1)
        matches: list[Match] = []
        while end >= n - 1 and len(matches) < most:
            length, furthest = n, min(longest, end + 1, len(suffix))
            while length < furthest and tokens[end - length] == suffix[-1 - length]:
                length += 1
            matches.append(Match(tokens, end + 1, length))
            end = self._previous[end]
        return matches
