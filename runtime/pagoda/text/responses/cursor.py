"""Text that arrives in pieces, read by generators that wait for more of it.

A reader is a generator: it yields where it needs text that is not there yet, and is resumed when there is more, or when there
will be none (`is_final`). What it takes depends on the text alone and not on where the pieces end: before it decides, it waits
until no later text could change the decision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]
"""A reader, with what it returns."""

MAX_HELD_CHARACTERS = 1 << 16
_SPACE = re.compile(r"\s*")


class MalformedError(Exception):
    """The text is not what the format has at this place."""


class LiteralFinder:
    """Finds the first of some literals, and the beginning of one at the end of the text so far."""

    def __init__(self, literals: Iterable[str]) -> None:
        # Of two that begin alike, the longer one is meant.
        self.literals = tuple(sorted(set(filter(None, literals)), key=len, reverse=True))
        self._search = re.compile("|".join(map(re.escape, self.literals)) or r"(?!)").search
        self._longest = max(map(len, self.literals), default=1)
        self._partial = re.compile("|".join(map(_beginnings, self.literals)) or r"\Z").search

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """The first literal in `text` from `start` on."""
        return self._search(text, start)

    def settled(self, text: str, start: int) -> int:
        """Where the end of `text` begins that may be the beginning of a literal; its length if there is none."""
        match = self._partial(text, max(start, len(text) - self._longest + 1))
        return len(text) if match is None else match.start()


@lru_cache(maxsize=256)
def finder_of(literals: tuple[str, ...]) -> LiteralFinder:
    """The finder of `literals`; those of formats are few, and compiled once."""
    return LiteralFinder(literals)


def _beginnings(literal: str) -> str:
    """A pattern for every proper beginning of `literal` at the end of a text."""
    pattern = ""
    for character in reversed(literal[:-1]):
        pattern = re.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return f"{pattern}\\Z" if pattern else r"(?!)"


class TextCursor:
    """The text that was not read yet. A reader moves `position`; `keep` stops what it has read from being forgotten."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.kept: int | None = None
        self.is_final = False

    def append(self, text: str) -> None:
        """More text came."""
        if self.kept is None:
            self.text = self.text[self.position :] + text
            self.position = 0
        else:
            self.text += text

    def keep(self, start: int) -> None:
        """Be able to go back to `start` until `forget`."""
        self.kept = start

    def forget(self) -> None:
        """What was read is not needed again."""
        self.kept = None

    @property
    def at_end(self) -> bool:
        """Whether all text that came has been read."""
        return self.position >= len(self.text)

    def more(self) -> Reading[bool]:
        """Wait for more text; False when there is none to come. A reader that may have to go back does not wait for ever."""
        if self.is_final:
            return False
        if self.kept is not None and len(self.text) - self.kept > MAX_HELD_CHARACTERS:
            raise MalformedError
        yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, which stays unread; empty at the end."""
        while self.at_end:
            if not (yield from self.more()):
                return ""
        return self.text[self.position]

    def skip_space(self, emit: Callable[[str], None] | None = None) -> Reading[None]:
        """Read white space, and hand it on to `emit`."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if emit is not None and match.group():
                emit(match.group())
            if not self.at_end or not (yield from self.more()):
                return

    def match(self, literals: Sequence[str]) -> Reading[str]:
        """Read whichever of `literals` stands here (longer ones come first); empty if none does."""
        while True:
            for literal in literals:
                if self.text.startswith(literal, self.position):
                    self.position += len(literal)
                    return literal
                if not self.is_final and literal.startswith(self.text[self.position :]):
                    break
            else:
                return ""
            if not (yield from self.more()):
                continue

    def expect(self, literal: str) -> Reading[None]:
        """Read `literal`, with white space before it; raises `MalformedError` where something else stands."""
        if literal:
            yield from self.skip_space()
            if not (yield from self.match((literal,))):
                self.drop_beginning_of((literal,))
                raise MalformedError

    def drop_beginning_of(self, literals: Sequence[str]) -> None:
        """Where the text was cut off within one of `literals`, read what there is of it."""
        if self.is_final and any(literal.startswith(self.text[self.position :]) for literal in literals):
            self.position = len(self.text)

    def until(
        self, finder: LiteralFinder, emit: Callable[[str], None], *, drops_beginning: bool = False
    ) -> Reading[str]:
        """Read up to and with a literal, handing on what is before it as it comes; the literal, or empty at the end.

        `drops_beginning`: where the text was cut off within a literal, what there is of it is not handed on.
        """
        while True:
            text, start = self.text, self.position
            match = finder.find(text, start)
            if match is not None and (self.is_final or match.end() < len(text) or _is_longest(finder, match)):
                self.position = match.end()
                if match.start() > start:
                    emit(text[start : match.start()])
                return match.group()
            if match is not None:
                settled = match.start()
            else:
                settled = len(text) if self.is_final and not drops_beginning else finder.settled(text, start)
            self.position = len(text) if self.is_final else settled
            if settled > start:
                emit(text[start:settled])
            if not (yield from self.more()):
                return ""


def _is_longest(finder: LiteralFinder, match: re.Match[str]) -> bool:
    found = match.group()
    return not any(literal != found and literal.startswith(found) for literal in finder.literals)
