"""Drafts by look-up: what followed the last tokens when they stood earlier in prompt or output (prompt lookup decoding)."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.scheduling.request import Request
from pagoda.speculation.history import BREAK, History, IndexBudget

# Places compared for the one with the most equal tokens.
_MOST_PLACES = 8


class NgramDrafter:
    """A request's own text: its predicted output where one was given, its prompt, and its output so far."""

    def __init__(self, request: Request, shortest: int, longest: int, budget: IndexBudget | None = None) -> None:
        self._request = request
        self._longest = longest
        self._history = History(shortest, budget)
        self._prediction = request.spec.prediction_token_ids
        self._history.append([*self._prediction, BREAK] if self._prediction else [])
        self._num_taken = 0  # of the request's tokens

    def close(self) -> None:
        self._history.release()

    def propose(self, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that may come next."""
        request, history = self._request, self._history
        if request.num_tokens > self._num_taken:
            history.append(request.token_ids[self._num_taken :])
            self._num_taken = request.num_tokens
        if not history.index():
            return []
        if self._prediction and request.num_output_tokens == 0:
            return self._prediction[:limit]
        tokens = history.tokens
        matches = history.find(tokens, self._longest, _MOST_PLACES)
        if not matches:
            return []
        follows = max(matches, key=lambda match: match.length).follows
        return _copied(tokens, follows, limit)


def _copied(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; behind the end the copy goes on with what it copied, as a repetition does."""
    drafts = tokens[start : start + count]
    period = len(tokens) - start
    while len(drafts) < count:
        drafts.append(drafts[len(drafts) - period])
    return drafts[: drafts.index(BREAK)] if BREAK in drafts else drafts
