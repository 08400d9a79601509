"""The description of a response format: how a model family marks reasoning and tool calls. Data only.

A tool call, read by `machine.py`; what is empty is not there, and white space may stand wherever a blank is drawn:

    trigger start [ open before[0] before[1] … NAME until  preamble ARGUMENTS postamble close  separator ]…  end

The trigger opens the first call or a section of calls. Without one (`trigger=""`), calls begin the answer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning between two markers. `implicit`: an answer begins in it although nothing opened it (DeepSeek R1)."""

    open: str
    close: str
    implicit: bool = False


@dataclass(frozen=True, slots=True)
class Json:
    """The arguments are one JSON value."""


@dataclass(frozen=True, slots=True)
class NamedJson:
    """One JSON object has the name and the arguments, under one of `keys`; no name stands before it.

    `strict`: an object whose first key is none of a call's is no call, which matters where no marker announces one.
    """

    keys: tuple[str, ...] = ("arguments", "parameters")
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Parameters:
    """Each argument in markup: `open KEY key_end value_open VALUE close`, of strings verbatim, of others coerced.

    `typed`: the key is followed by `typed[0]` if the value is a string, by `typed[1]` if it is JSON (DeepSeek's DSML).
    `trims_newline`: one newline after the opening and before the closing markup is not part of the value.
    """

    open: str
    key_end: str
    close: str
    value_open: str = ""
    typed: tuple[str, ...] = ()
    trims_newline: bool = False


@dataclass(frozen=True, slots=True)
class PythonKeywords:
    """Keyword arguments in Python's syntax, up to the closing parenthesis."""


@dataclass(frozen=True, slots=True)
class LooseJson:
    """An object whose keys stand without quotes and whose strings stand between two marks (Gemma)."""

    quote: str


Arguments = Json | NamedJson | Parameters | PythonKeywords | LooseJson


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """One way to write tool calls; see the module.

    `until`: what ends the name and is read; `before_next`: what ends it and is left. `id_mark`: ends the name where an id
    follows it, up to `until`. `name_pattern`: a regular expression for the text of the name, with the group `name` and,
    where the call's id is in it, `id`. `id_characters`: ids of calls have so many letters and digits; chat templates insist.
    """

    trigger: str = ""
    start: str = ""
    open: str = ""
    before: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    before_next: tuple[str, ...] = ()
    id_mark: str = ""
    name_pattern: str = ""
    preamble: tuple[str, ...] = ()
    arguments: Arguments = Json()
    postamble: tuple[str, ...] = ()
    close: str = ""
    separator: str = ""
    end: str = ""
    id_characters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Messages with a header each, after which a marker begins the body (gpt-oss's harmony)."""

    start: str
    channel: str
    message: str
    constrain: str
    ends: tuple[str, ...]
    reasoning_channels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """How one family writes its answers. `calls`: several ways to write a call are tried in their order.

    `tokens`: parts of the literals that may be tokens of their own though they are no whole literal.
    """

    reasoning: Reasoning | None = None
    calls: tuple[Calls, ...] = ()
    channels: Channels | None = None
    tokens: tuple[str, ...] = ()

    def literals(self) -> frozenset[str]:
        """All strings of the format that may be one token: those of more than two characters without white space."""
        found = (text for part in (self.reasoning, self.calls, self.channels, self.tokens) for text in _strings(part))
        return frozenset(text for text in found if len(text) > 2 and not any(map(str.isspace, text)))

    def map_literals(self, function: Callable[[str], str]) -> ResponseFormat:
        """The format with `function` applied to every literal; patterns and keys stay as they are."""
        return cast("ResponseFormat", _mapped(self, function))


_NO_LITERALS = frozenset({"name_pattern", "keys", "reasoning_channels"})


def _strings(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _strings(item)
    elif is_dataclass(part):
        for field in fields(part):
            if field.name not in _NO_LITERALS:
                yield from _strings(getattr(part, field.name))


def _mapped(part: Any, function: Callable[[str], str]) -> Any:
    if isinstance(part, str):
        return function(part)
    if isinstance(part, tuple):
        return tuple(_mapped(item, function) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(
            part,
            **{
                field.name: _mapped(getattr(part, field.name), function)
                for field in fields(part)
                if field.name not in _NO_LITERALS
            },
        )
    return part
