"""The state of one constrained output, and the tokens that may come next.

prompt │ reasoning … end of reasoning │ grammar …                    │ end of sequence
       │ anything but the end         │ what the grammar allows      │ where the grammar accepts

The reasoning may be optional: then the first token decides, which is the one that opens it, or one of the grammar's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import llguidance
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]
_ALL = np.int32(-1)


class GrammarMatcher:
    """Follows the tokens of an output that are kept, and says which may come next. Drafts leave no trace in it.

    `end_ids`: the tokens that end the output, allowed exactly where the grammar accepts. `min_tokens` and `ignore_eos` hold
    them and `stop_token_ids` back, as long as the grammar allows anything else. Where it allows nothing else, the output is
    complete, whatever they say. `starts_after` and `opened_by`: see `GrammarSpec`; several tokens that end the reasoning may
    be spelled with others, of which `token_bytes` gives the bytes. `vocabulary_eos_ids`: what llguidance takes for the end.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        *,
        vocab_size: int,
        vocabulary_eos_ids: Sequence[int],
        end_ids: Sequence[int],
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
        starts_after: tuple[int, ...] = (),
        opened_by: int | None = None,
        token_bytes: Callable[[int], bytes] = lambda _: b"",
    ) -> None:
        self.num_words = -(-vocab_size // 32)
        self.error: str | None = None
        self._matcher = matcher
        self._end_ids = frozenset(token_id for token_id in end_ids if token_id < vocab_size)
        self._ends = _bits(self._end_ids, self.num_words)
        self._all_ends = _bits({*self._end_ids, *vocabulary_eos_ids}, self.num_words)
        self._held = _bits({*self._end_ids, *stop_token_ids}, self.num_words)
        self._min_tokens = min_tokens
        self._ignore_eos = ignore_eos
        self._num_tokens = 0
        self._num_consumed = 0  # by the matcher; `fill` takes those of drafts back
        self._opened_by = opened_by if starts_after else None
        self._closer = _Closer(starts_after, token_bytes)
        # What of the reasoning may belong to its end; None where the grammar is followed.
        self._reasoning: bytes | None = b"" if starts_after and opened_by is None else None

    def advance(self, token_id: int) -> bool:
        """Take a token of the output; whether the output is complete, so that nothing may follow.

        `error` says why no further token can be found, once it is not None: then the output cannot be completed.
        """
        self._num_tokens += 1
        if self._reasoning is not None:
            self._reasoning = self._closer.tail_after(self._reasoning, token_id)
            return False
        if self._num_tokens == 1 and token_id == self._opened_by:
            self._reasoning = b""
            return False
        if self.error is not None:
            return False
        if token_id in self._end_ids:
            return self._matcher.is_accepting()
        if not self._matcher.consume_token(token_id):
            self._note_error()
            return False
        self._num_consumed += 1
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    def fill(self, words: Words, drafts: Sequence[int] = ()) -> None:
        """Write masks, int32 `[1 + len(drafts), num_words]`: of the next token, and of that behind each draft.

        A mask is never empty. Behind a draft that is not allowed, or that ends the output, everything is: it does not count.
        """
        self._fill_row(words[0])
        if not len(drafts):
            return
        num_tokens, error = self._num_tokens, self.error
        reasoning = self._reasoning
        self._num_consumed = 0
        num_filled = 1
        for draft in drafts:
            if not self._allows(words[num_filled - 1], draft) or self.advance(draft) or self.error is not None:
                break
            self._fill_row(words[num_filled])
            num_filled += 1
        words[num_filled:] = _ALL
        if self._num_consumed:
            self._matcher.rollback(self._num_consumed)
        self._num_tokens, self._reasoning, self.error = num_tokens, reasoning, error

    def _fill_row(self, words: Words) -> None:
        if self._reasoning is not None:
            words[:] = _ALL
            words &= ~self._ends
            return
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            self._note_error()
        if self.error is not None:
            words[:] = _ALL  # whatever comes, the request ends with the error
            return
        words &= ~self._all_ends
        if self._opened_by is not None and self._num_tokens == 0:
            words |= _bits((self._opened_by,), self.num_words)
        if not matcher.is_accepting():
            if not words.any():
                self.error = "the grammar allows no token here"
                words[:] = _ALL
        elif self._num_tokens >= self._min_tokens and not self._ignore_eos:
            words |= self._ends
        elif (words & ~self._held).any():
            words &= ~self._held
        else:
            words |= self._ends

    @staticmethod
    def _allows(words: Words, token_id: int) -> bool:
        word, bit = divmod(token_id, 32)
        return word < len(words) and bool(int(words[word]) >> bit & 1)

    def _note_error(self) -> None:
        reason = self._matcher.get_error().split("\n", 1)[0].strip()
        self.error = f"the grammar cannot be followed any further: {reason[:200] or 'unknown'}"


class _Closer:
    """Finds the end of the reasoning: a single token by its id, several by their bytes, however these are spelled."""

    def __init__(self, token_ids: tuple[int, ...], token_bytes: Callable[[int], bytes]) -> None:
        self._single = token_ids[0] if len(token_ids) == 1 else None
        self._text = b"".join(map(token_bytes, token_ids)) if len(token_ids) > 1 else b""
        self._token_bytes = token_bytes

    def tail_after(self, tail: bytes, token_id: int) -> bytes | None:
        """The last bytes of the reasoning with `token_id` behind `tail`; None once its end was in them."""
        if self._single is not None:
            return None if token_id == self._single else b""
        tail += self._token_bytes(token_id)
        return None if self._text in tail else tail[-len(self._text) :]


def _bits(token_ids: Collection[int], num_words: int) -> Words:
    words = np.zeros(num_words, dtype=np.uint32)
    for token_id in token_ids:
        if token_id < 32 * num_words:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words.view(np.int32)
