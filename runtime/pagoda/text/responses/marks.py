"""Markers that are single tokens of the vocabulary, told apart from text that merely spells them.

Where a format's marker is a token of its own, the detokenizer puts one character in its place that no text can hold (a lone
surrogate: UTF-8 has none), and the format's literals are rewritten to it. So a parser of text matches markers by their token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pagoda.text.responses.syntax import ResponseFormat

if TYPE_CHECKING:
    from pagoda.text.tokenizer import Tokenizer

_FIRST = 0xD800
_MARK = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Marks:
    """`characters`: the character of each marker's token id. `texts`: the text of each character."""

    characters: Mapping[int, str]
    texts: Mapping[str, str]
    special: frozenset[str] = frozenset()

    @cached_property
    def _plain(self) -> dict[int, str]:
        return {ord(mark): text for mark, text in self.texts.items()}

    @cached_property
    def _shown(self) -> dict[int, str]:
        return {ord(mark): "" if mark in self.special else text for mark, text in self.texts.items()}

    @cached_property
    def _escaped(self) -> dict[int, str]:
        return {ord(mark): json.dumps(text, ensure_ascii=False)[1:-1] for mark, text in self.texts.items()}

    def spelled(self, text: str, *, skip_special: bool = False) -> str:
        """`text` with every marker as it is spelled; those of special tokens are dropped with `skip_special`."""
        if text.isascii() or _MARK.search(text) is None:
            return text
        return text.translate(self._shown if skip_special else self._plain)

    def escaped(self, text: str) -> str:
        """JSON `text` with markers spelled as they are written in a JSON string."""
        return text if text.isascii() or _MARK.search(text) is None else text.translate(self._escaped)

    def marked(self, text: str) -> str:
        """`text` with every spelled marker as its character: what a stop string looks for."""
        for mark, spelled in self.texts.items():
            text = text.replace(spelled, mark)
        return text


NO_MARKS = Marks({}, {})


def bind(format: ResponseFormat, tokenizer: Tokenizer) -> tuple[ResponseFormat, Marks]:
    """The format with markers that are added tokens of `tokenizer` as characters, and those characters."""
    added = tokenizer.added_tokens
    found = sorted((text for text in format.literals() if text in added), key=len, reverse=True)
    marks = {text: chr(_FIRST + index) for index, text in enumerate(found)}

    def rewrite(literal: str) -> str:
        for text, mark in marks.items():
            literal = literal.replace(text, mark)
        return literal

    return format.map_literals(rewrite), Marks(
        {added[text]: mark for text, mark in marks.items()},
        {mark: text for text, mark in marks.items()},
        frozenset(mark for text, mark in marks.items() if added[text] in tokenizer.special_token_ids),
    )
