"""Token ids to text while they come."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from pagoda.text.responses.marks import Marks
from pagoda.text.tokenizer import Tokenizer

# A character has at most four bytes, so the last four tokens of a prompt determine how it ends.
_PROMPT_TAIL_TOKENS = 4


class IncrementalDetokenizer:
    """The text of one completion, given out as far as it is settled; each token costs a constant amount of work.

    The pieces joined are what `Tokenizer.decode` makes of all ids. With `prompt_token_ids` the text is that of a
    continuation: a leading space of its first token stays, and a character that the prompt began is completed.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._stream = tokenizer.decoder_plan.stream()
        tail = self._last_tokens(prompt_token_ids)
        if tail:
            self._stream.feed(tail)
            self._stream.cut()
        self._settled_texts = tokenizer.settled_texts
        self._is_settled = self._stream.is_settled

    def feed(self, token_id: int) -> str:
        """The text that one more id settles. An id without a token (a padded vocabulary has some) adds nothing."""
        if token_id in self._skipped:
            return ""
        if self._is_settled:  # nearly always, and then the stream decoder is not needed
            text = self._settled_texts[token_id]
            if text is not None:
                return text
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        text = self._stream.feed([token])
        self._is_settled = self._stream.is_settled
        return text

    def finish(self) -> str:
        """What was held back, an unfinished character as U+FFFD. Nothing may be fed after this."""
        return self._stream.finish()

    def _last_tokens(self, prompt_token_ids: Sequence[int]) -> list[str]:
        """The last tokens of the prompt that have text; they decide how a continuation begins."""
        tail: list[str] = []
        for token_id in reversed(prompt_token_ids):
            token = None if token_id in self._skipped else self._tokenizer.token(token_id)
            if token is not None:
                tail.append(token)
                if len(tail) == _PROMPT_TAIL_TOKENS:
                    break
        return tail[::-1]


class MarkingDetokenizer(IncrementalDetokenizer):
    """Puts the characters of `marks` in place of the tokens that are markers, which are never skipped."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Marks,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._skipped -= marks.characters.keys()
        self._marks = marks

    @override
    def feed(self, token_id: int) -> str:
        text = super().feed(token_id)
        mark = self._marks.characters.get(token_id)
        if mark is None:
            return text
        before, _, _ = text.rpartition(self._marks.texts[mark])
        return before + mark
