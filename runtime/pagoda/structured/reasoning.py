"""The reasoning before an answer: where it ends, and how long it may be.

    prompt │ reasoning … starts_after │ answer …
           │ at most `reasoning_budget` tokens; then the tokens of `starts_after` are the only ones that are allowed

The reasoning may be optional: then the first token decides, which opens it or belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagoda.structured.spec import GrammarSpec

TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class _State:
    """`head`: what of the output may belong to the opening of its reasoning; None once that is decided. `tail`: what of the
    reasoning may belong to its end; None outside of it. `num_tokens`: of the reasoning so far.
    """

    head: bytes | None
    tail: bytes | None
    num_tokens: int = 0


class Reasoning:
    """Follows the tokens of one output to the end of its reasoning.

    `spec`: see `GrammarSpec` for `starts_after`, `opened_by`, `reasoning_budget` and `reasoning_left_by`. Several tokens that
    open or end the reasoning may be spelled with others, of which `token_bytes` gives the bytes. `state` may be kept and set
    again. `in_grammar`: tokens of the reasoning belong to the grammar, too.
    """

    def __init__(self, spec: GrammarSpec, token_bytes: TokenBytes) -> None:
        self._end = spec.starts_after
        self._opening = spec.opened_by if spec.starts_after else ()
        self._left_by = frozenset(spec.reasoning_left_by)
        self._budget = spec.reasoning_budget
        self.in_grammar = spec.reasoning_in_grammar
        self._end_text = _text(self._end, token_bytes)
        self._opening_text = _text(self._opening, token_bytes)
        self._token_bytes = token_bytes
        self.state = _State(b"" if self._opening else None, b"" if spec.starts_after and not self._opening else None)

    @property
    def is_undecided(self) -> bool:
        """Whether the next token may open the reasoning."""
        return self.state.head is not None

    @property
    def hides_grammar(self) -> bool:
        """Whether the next token belongs to the reasoning, its end included, of which the grammar knows nothing."""
        return self.state.tail is not None and not self.in_grammar

    @property
    def opener(self) -> int | None:
        """The token that opens the reasoning, if there is one that does, and it may come next beside those of the grammar."""
        is_one = len(self._opening) == 1 and not self.in_grammar
        return self._opening[0] if is_one and self.state.head is not None else None

    @property
    def forced(self) -> int | None:
        """The only token that may come next: the budget is used up."""
        if self._budget is None or self.state.tail is None or self.state.num_tokens < self._budget:
            return None
        return self._end[min(self.state.num_tokens - self._budget, len(self._end) - 1)]

    def may_force(self, num_tokens: int) -> bool:
        """Whether one of the next `num_tokens` tokens may be a forced one."""
        if self._budget is None or (self.state.tail is None and self.state.head is None):
            return False
        return self.state.num_tokens + num_tokens > self._budget

    def advance(self, token_id: int) -> bool:
        """Take a token of the output; whether it belongs to the reasoning, and not to the grammar."""
        state = self.state
        if state.tail is not None:
            self.state = _State(None, self._tail_after(state.tail, token_id), state.num_tokens + 1)
            return not self.in_grammar
        if state.head is not None:
            self.state = self._opened(state.head, token_id)
            return self.hides_grammar
        return False

    def _opened(self, head: bytes, token_id: int) -> _State:
        if len(self._opening) == 1:
            return _State(None, b"" if token_id == self._opening[0] else None)
        head = (head + self._token_bytes(token_id)).lstrip()
        if head.startswith(self._opening_text):
            return _State(None, head[len(self._opening_text) :])
        return _State(head if self._opening_text.startswith(head) else None, None)

    def _tail_after(self, tail: bytes, token_id: int) -> bytes | None:
        """The last bytes of the reasoning with `token_id` behind `tail`; None once its end was in them."""
        if token_id in self._left_by:
            return None
        if len(self._end) == 1:
            return None if token_id == self._end[0] else b""
        tail += self._token_bytes(token_id)
        return None if self._end_text in tail else tail[-len(self._end_text) :]


def _text(token_ids: tuple[int, ...], token_bytes: TokenBytes) -> bytes:
    return b"".join(map(token_bytes, token_ids)) if len(token_ids) > 1 else b""
