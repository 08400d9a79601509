"""Streaming implementations of the decoders of the `tokenizers` library.

A decoder there is a chain of steps over the whole list of token strings. A stream of tokens cannot be decoded again from
its start for every token, and decoding a window of it is wrong at the edges (a run of byte tokens is valid or not as a
whole; a first token loses its leading space). So each kind of step has an implementation that takes tokens one by one, keeps
the little state it needs, and holds back what later tokens may still change:

    token strings ─▶ tokenwise (Replace, Metaspace, WordPiece, Strip) ─▶ ByteFallback ─▶ Fuse ─▶ leading Strip ─▶ text
    token strings ─▶ ByteLevel ─▶ text

Fed everything and finished, a chain has given out exactly what the library's decoder makes of the whole list.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import Regex, decoders

from pagoda.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\ufffd"


class DecoderStep(Protocol):
    """One step of a chain, with the state of one stream."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing is held back and the beginning of the text is past: a token's text depends on it alone."""

    def feed(self, pieces: list[str]) -> list[str]:
        """Take the next pieces and give out what is settled."""

    def finish(self) -> list[str]:
        """Give out what was held back: nothing follows."""

    def cut(self) -> None:
        """What came so far was the prompt: keep its unfinished character, forget all else that is held back."""


class DecoderStream:
    """The decoder of one stream of token strings."""

    def __init__(self, steps: Sequence[DecoderStep]) -> None:
        self._steps = steps

    @property
    def is_settled(self) -> bool:
        """Whether a token in `DecoderPlan.settled_text` adds exactly that text and leaves the state as it is."""
        return all(step.is_settled for step in self._steps)

    def feed(self, tokens: list[str]) -> str:
        """The text that `tokens` settle."""
        for step in self._steps:
            tokens = step.feed(tokens)
        return "".join(tokens)

    def finish(self) -> str:
        """The rest of the text; the stream takes no more."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = step.feed(pieces) + step.finish()
        return "".join(pieces)

    def cut(self) -> None:
        """Mark the end of the prompt: text held back so far is not given out later, except as part of a character."""
        for step in self._steps:
            step.cut()


class DecoderPlan:
    """How a tokenizer's tokens become text; makes a stream for each request. Holds caches, no state of a stream.

    `decoder`: the decoder as tokenizer.json describes it, or None (tokens are then joined with spaces, as the library does).
    Raises `CheckpointError` for a decoder that has no streaming implementation.
    """

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        descriptions = _flatten(decoder)
        self._makers: list[Callable[[], DecoderStep]] = []
        self._settled_text: list[Callable[[str], str | None]] = []
        self._byte_level: _ByteLevelTable | None = None
        self._byte_fallback = False
        self._tokenwise: list[_TokenwiseRule] = []
        fused = False
        for description in descriptions:
            if fused and description["type"] == "Strip" and not description["stop"]:
                self._add_leading_strip(description)
            elif fused and description["type"] != "Fuse":
                raise CheckpointError(f"the tokenizer's decoder has {description['type']} after joining its tokens")
            else:
                self._add(description)
            fused = fused or description["type"] in ("Fuse", "ByteLevel")

    def stream(self) -> DecoderStream:
        """A decoder at the beginning of a text."""
        return DecoderStream([make() for make in self._makers])

    def settled_text(self, token: str) -> str | None:
        """What `token` adds to a stream that `is_settled`; None where that depends on the tokens that follow it."""
        text: str | None = token
        for step in self._settled_text:
            if text is not None:
                text = step(text)
        return text

    def token_bytes(self, token: str) -> bytes:
        """The bytes that `token` adds to a text it does not begin."""
        if self._byte_level is not None:
            return self._byte_level[token]
        for rule in self._tokenwise:
            token = rule.later(token)
        match = _BYTE_TOKEN.match(token) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()

    def _add(self, description: Mapping[str, Any]) -> None:
        kind = description["type"]
        if kind == "ByteLevel":
            table = self._byte_level = _ByteLevelTable()
            self._makers.append(lambda: _ByteLevel(table))
            self._settled_text.append(lambda token: _whole_characters(table[token]))
        elif kind == "ByteFallback":
            self._byte_fallback = True
            self._makers.append(_ByteFallback)
            self._settled_text.append(lambda token: None if _BYTE_TOKEN.match(token) else token)
        elif kind != "Fuse":  # joining is what a stream does anyway
            rule = _TokenwiseRule(description)
            self._tokenwise.append(rule)
            self._makers.append(lambda: _Tokenwise(rule))
            self._settled_text.append(rule.later)

    def _add_leading_strip(self, description: Mapping[str, Any]) -> None:
        content, count = description["content"], description["start"]
        self._makers.append(lambda: _LeadingStrip(content, count))


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return [{"type": "Join"}]
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for nested in decoder["decoders"] for step in _flatten(nested)]


class _ByteLevelTable(dict[str, bytes]):
    """Token string to bytes, filled as tokens occur (so never larger than the vocabulary).

    Byte-level vocabularies write each byte as one printable character; a token with any other character (an added token)
    is decoded as its own UTF-8 bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of = {chr(byte): byte for byte in printable}
        self._byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(others)}

    def __missing__(self, token: str) -> bytes:
        byte_of = self._byte_of
        if all(character in byte_of for character in token):
            value = bytes(byte_of[character] for character in token)
        else:
            value = token.encode()
        self[token] = value
        return value


def _whole_characters(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class _ByteLevel:
    def __init__(self, table: _ByteLevelTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_settled(self) -> bool:
        return not self._decoder.getstate()[0]

    def feed(self, pieces: list[str]) -> list[str]:
        table = self._table
        return [self._decoder.decode(b"".join([table[piece] for piece in pieces]))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]

    def cut(self) -> None:
        """Nothing to forget: only the bytes of an unfinished character are ever held back."""


class _ByteFallback:
    """Joins runs of byte tokens `<0xE4>`. A run that is not valid UTF-8 becomes one U+FFFD a byte, all of it.

    So nothing of a run is settled before it ends, and a run is held back as a whole; it is decoded once.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    @property
    def is_settled(self) -> bool:
        return not self._run

    def feed(self, pieces: list[str]) -> list[str]:
        settled: list[str] = []
        for piece in pieces:
            match = _BYTE_TOKEN.match(piece)
            if match:
                self._run.append(int(match[1], 16))
                continue
            if self._run:
                settled += self.finish()
            settled.append(piece)
        return settled

    def finish(self) -> list[str]:
        run, self._run = self._run, bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)

    def cut(self) -> None:
        self._run = _unfinished_character(self._run)


def _unfinished_character(data: bytearray) -> bytearray:
    """The last one to three bytes of `data` if they begin a character and do not complete it."""
    for length in range(1, min(3, len(data)) + 1):
        tail = data[-length:]
        if tail[0] & 0xC0 == 0xC0:
            try:
                consumed = codecs.utf_8_decode(tail, "strict", False)[1]
            except UnicodeDecodeError:
                return bytearray()
            return tail if consumed == 0 else bytearray()
    return bytearray()


class _TokenwiseRule:
    """A step that treats each token independently, except for the first; the library's own code does it."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        decoder = _library_decoder(description)

        @lru_cache(maxsize=1 << 16)
        def later(token: str) -> str:
            # An empty token in front takes the first place and adds nothing.
            text: str = decoder.decode(["", token])
            return text

        self.later = later
        self.first: Callable[[str], str] = lambda token: decoder.decode([token])


class _Joined:
    """What the library does without a decoder: tokens with spaces between them."""

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def _library_decoder(description: Mapping[str, Any]) -> Any:
    kind = description["type"]
    if kind == "Join":
        return _Joined()
    if kind == "Replace":
        pattern = description["pattern"]
        return decoders.Replace(
            Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"], description["content"]
        )
    if kind == "Metaspace":
        return decoders.Metaspace(description["replacement"], description.get("prepend_scheme", "always"))
    if kind == "WordPiece":
        return decoders.WordPiece(description["prefix"], description["cleanup"])
    if kind == "Strip":
        return decoders.Strip(description["content"], description["start"], description["stop"])
    raise CheckpointError(f"the tokenizer's decoder has a step of type {kind}, which cannot stream")


class _Tokenwise:
    def __init__(self, rule: _TokenwiseRule) -> None:
        self._rule = rule
        self._at_start = True

    @property
    def is_settled(self) -> bool:
        return not self._at_start

    def feed(self, pieces: list[str]) -> list[str]:
        later = self._rule.later
        settled = [later(piece) for piece in pieces]
        if self._at_start and pieces:
            self._at_start = False
            settled[0] = self._rule.first(pieces[0])
        return settled

    def finish(self) -> list[str]:
        return []

    def cut(self) -> None:
        """Nothing is held back."""


class _LeadingStrip:
    """Drops up to `count` characters `content` from the beginning of the whole text."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    @property
    def is_settled(self) -> bool:
        return not self._left

    def feed(self, pieces: list[str]) -> list[str]:
        if not self._left:
            return pieces
        text = "".join(pieces)
        while self._left and text:
            if not text.startswith(self._content):
                self._left = 0
                break
            text = text.removeprefix(self._content)
            self._left -= 1
        return [text]

    def finish(self) -> list[str]:
        return []

    def cut(self) -> None:
        self._left = 0
