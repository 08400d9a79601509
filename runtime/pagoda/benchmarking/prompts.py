"""What made-up prompts are made of: token ids where exact lengths count, words where an endpoint takes text only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from pagoda.errors import InvalidRequestError
from pagoda.text.tokenizer import Tokenizer

Content = str | tuple[int, ...]
"""A text, or token ids that an endpoint takes as they are."""

MAX_FITTING_ROUNDS = 8
_SYLLABLES = [consonant + vowel for consonant in "bdfklmnprstv" for vowel in "aeio"]


class PromptSource(Protocol):
    """Makes pieces of prompts."""

    def make(self, rng: random.Random, num_tokens: int) -> Content:
        """A piece of `num_tokens` tokens, drawn by `rng`."""

    def join(self, first: Content, second: Content) -> Content:
        """The two pieces as one."""


class TokenIdSource:
    """Pieces of random token ids out of `token_ids`: every length is exact."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("there are no token ids to make prompts of")
        self._token_ids = tuple(token_ids)

    def make(self, rng: random.Random, num_tokens: int) -> Content:
        """`num_tokens` ids, drawn with repetition."""
        return tuple(rng.choices(self._token_ids, k=num_tokens))

    def join(self, first: Content, second: Content) -> Content:
        """The ids of both, in order."""
        assert isinstance(first, tuple), "this source makes ids"
        assert isinstance(second, tuple), "this source makes ids"
        return first + second


class WordSource:
    """Pieces of random words. With a `tokenizer` a piece has the number of tokens asked for, else as many words."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def make(self, rng: random.Random, num_tokens: int) -> Content:
        """Words with a space between, cut so that the tokenizer counts `num_tokens`, or as near as words get to it."""
        words = [_word(rng) for _ in range(num_tokens)]
        if self._tokenizer is None:
            return " ".join(words)
        return _fitted(words, num_tokens, self._tokenizer)

    def join(self, first: Content, second: Content) -> Content:
        """Both texts with a space between."""
        return f"{first} {second}"


def common_words(count: int, seed: int = 0) -> str:
    """A text of `count` made-up words, to find out which token ids a server's tokenizer uses."""
    rng = random.Random(seed)
    return " ".join(_word(rng) for _ in range(count))


def plain_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Every id of the vocabulary that is no special token."""
    return [token_id for token_id in range(tokenizer.vocab_size) if token_id not in tokenizer.special_token_ids]


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4)))


def _fitted(words: list[str], num_tokens: int, tokenizer: Tokenizer) -> str:
    """The longest run of `words` of at most `num_tokens` tokens, filled up to `num_tokens` with one-syllable words."""
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(" ".join(words[:middle]), add_special_tokens=False)) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    text = " ".join(words[: max(1, low)])
    for _ in range(MAX_FITTING_ROUNDS):
        missing = num_tokens - len(tokenizer.encode(text, add_special_tokens=False))
        if missing <= 0:
            break
        longer = text + " a" * max(1, missing // 2)
        if len(tokenizer.encode(longer, add_special_tokens=False)) > num_tokens:
            break
        text = longer
    return text
