"""The state of one constrained output, and the tokens that may come next.

prompt │ reasoning … end of reasoning │ grammar …                    │ end of sequence
       │ anything but the end         │ what the grammar allows      │ where the grammar accepts

Reasoning may have a budget (`structured.reasoning`), also where nothing else is asked of the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import llguidance
import numpy as np
import numpy.typing as npt
from typing_extensions import override

from pagoda.structured.reasoning import Reasoning

Words = npt.NDArray[np.int32]
_ALL = np.int32(-1)


class OutputMatcher(ABC):
    """Follows the tokens of an output that are kept, and says which may come next. Drafts leave no trace in it.

    `error` says why no further token can be found, once it is not None: then the output cannot be completed.
    """

    def __init__(self, vocab_size: int, reasoning: Reasoning) -> None:
        self.num_words = -(-vocab_size // 32)
        self.num_bytes = 4 * self.num_words
        self.error: str | None = None
        self._reasoning = reasoning
        self._num_tokens = 0
        self._num_consumed = 0  # of these, by the grammar

    @abstractmethod
    def advance(self, token_id: int) -> bool:
        """Take a token of the output; whether the output is complete, so that nothing may follow."""

    @abstractmethod
    def restricts(self, num_tokens: int) -> bool:
        """Whether there may be a token that is not allowed as one of the next `num_tokens`."""

    def forced_tokens(self) -> list[int]:
        """The tokens that come next where the grammar leaves no choice: the text that must come, as the tokenizer cuts it."""
        return []

    @abstractmethod
    def _fill_row(self, words: Words, address: int) -> None:
        """Write the mask of the next token into `words`, which lie at `address`."""

    @abstractmethod
    def _roll_back(self, num_tokens: int) -> None:
        """Take back the last tokens that the grammar took."""

    def fill(self, words: Words, drafts: Sequence[int] = (), address: int | None = None) -> None:
        """Write masks, int32 `[1 + len(drafts), num_words]`: of the next token, and of that behind each draft.

        A mask is never empty. Behind a draft that is not allowed, or that ends the output, everything is: it does not count.
        `address`: of `words`, for it takes numpy as long as finding a mask to say.
        """
        if address is None:
            address = words.ctypes.data
        self._fill_row(words[0], address)
        if not len(drafts):
            return
        before = self._reasoning.state, self.error, self._num_tokens, self._num_consumed
        num_filled = 1
        for draft in drafts:
            if not _allows(words[num_filled - 1], draft) or self.advance(draft) or self.error is not None:
                break
            self._fill_row(words[num_filled], address + num_filled * self.num_bytes)
            num_filled += 1
        words[num_filled:] = _ALL
        if self._num_consumed > before[-1]:
            self._roll_back(self._num_consumed - before[-1])
        self._reasoning.state, self.error, self._num_tokens, self._num_consumed = before

    def _force(self, words: Words) -> bool:
        """Write the mask of the end of the reasoning, where that must come."""
        forced = self._reasoning.forced
        if forced is None:
            return False
        words[:] = 0
        _Bits((forced,), self.num_words).set(words)
        return True


class TextMatcher(OutputMatcher):
    """Any text, behind reasoning with a budget."""

    @override
    def advance(self, token_id: int) -> bool:
        self._reasoning.advance(token_id)
        return False

    @override
    def restricts(self, num_tokens: int) -> bool:
        return self._reasoning.may_force(num_tokens)

    @override
    def _fill_row(self, words: Words, address: int) -> None:
        if not self._force(words):
            words[:] = _ALL

    @override
    def _roll_back(self, num_tokens: int) -> None:
        pass


class GrammarMatcher(OutputMatcher):
    """Text of a grammar, behind reasoning if there is any.

    `end_ids`: the tokens that end the output, allowed exactly where the grammar accepts. `min_tokens` and `ignore_eos` hold
    them and `stop_token_ids` back, as long as the grammar allows anything else. Where it allows nothing else, the output is
    complete, whatever they say. `vocabulary_eos_ids`: what llguidance takes for the end.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        reasoning: Reasoning,
        *,
        vocab_size: int,
        vocabulary_eos_ids: Sequence[int],
        end_ids: Sequence[int],
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
    ) -> None:
        super().__init__(vocab_size, reasoning)
        self._matcher = matcher
        self._end_ids = frozenset(token_id for token_id in end_ids if token_id < vocab_size)
        self._ends = _Bits(self._end_ids, self.num_words)
        self._all_ends = _Bits({*self._end_ids, *vocabulary_eos_ids}, self.num_words)
        self._held = _Bits({*self._end_ids, *stop_token_ids}, self.num_words)
        self._nothing = bytes(self.num_bytes)
        self._min_tokens = min_tokens
        self._ignore_eos = ignore_eos

    @override
    def restricts(self, num_tokens: int) -> bool:
        return True

    @override
    def advance(self, token_id: int) -> bool:
        self._num_tokens += 1
        if self._reasoning.advance(token_id) or self.error is not None:
            return False
        if token_id in self._end_ids:
            return self._matcher.is_accepting()
        if not self._matcher.consume_token(token_id):
            self._note_error()
            return False
        self._num_consumed += 1
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    @override
    def forced_tokens(self) -> list[int]:
        if self._reasoning.is_undecided or self._reasoning.hides_grammar or self.error is not None:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()
        return forced

    @override
    def _roll_back(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)

    @override
    def _fill_row(self, words: Words, address: int) -> None:
        if not self._reasoning.in_grammar and self._force(words):
            return
        if self._reasoning.hides_grammar:
            words[:] = _ALL
            self._ends.clear(words)
            return
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(address, self.num_bytes)
        if matcher.is_error():
            self._note_error()
        if self.error is not None:
            words[:] = _ALL  # whatever comes, the request ends with the error
            return
        self._all_ends.clear(words)
        opener = self._reasoning.opener
        if opener is not None:
            _Bits((opener,), self.num_words).set(words)
        if not matcher.is_accepting():
            if words.tobytes() == self._nothing:
                self.error = "the grammar allows no token here"
                words[:] = _ALL
        elif self._num_tokens >= self._min_tokens and not self._ignore_eos:
            self._ends.set(words)
        elif not self._held.are_all_of(words):
            self._held.clear(words)
        else:
            self._ends.set(words)
        # Within a character the grammar does not let the reasoning end: that waits for the rest of it.
        forced = self._reasoning.forced if self._reasoning.in_grammar else None
        if forced is not None and _allows(words, forced):
            self._force(words)

    def _note_error(self) -> None:
        reason = self._matcher.get_error().split("\n", 1)[0].strip()
        if reason == "NoExtensionBias":  # llguidance's word
            reason = "no text that could follow satisfies it"
        self.error = f"the grammar cannot be followed any further: {reason[:200] or 'unknown'}"


def _allows(words: Words, token_id: int) -> bool:
    word, bit = divmod(token_id, 32)
    return word < len(words) and bool(int(words[word]) >> bit & 1)


class _Bits:
    """The bits of a few tokens in a mask: only the words that have them are touched."""

    def __init__(self, token_ids: Collection[int], num_words: int) -> None:
        words: dict[int, int] = {}
        for token_id in token_ids:
            if token_id < 32 * num_words:
                words[token_id // 32] = words.get(token_id // 32, 0) | 1 << token_id % 32
        self._words = [(index, np.uint32(bits).view(np.int32)) for index, bits in words.items()]

    def set(self, words: Words) -> None:
        for index, bits in self._words:
            words[index] |= bits

    def clear(self, words: Words) -> None:
        for index, bits in self._words:
            words[index] &= ~bits

    def are_all_of(self, words: Words) -> bool:
        """Whether no other bit is set in `words`."""
        others = words.copy()
        self.clear(others)
        return not others.any()
