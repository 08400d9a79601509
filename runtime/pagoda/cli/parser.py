"""Options of a command, by argparse, but with errors of one sentence: what is wrong, what is allowed, what may be meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from pagoda.config.names import nearest
from pagoda.errors import ConfigError

MAX_SHOWN_CHARACTERS = 80
_PLAIN = "\0"  # no argument of a program can hold it

_CHOICE = re.compile(
    r"argument (?P<name>.+?): invalid choice: (?P<value>'.*?'|\S+) \(choose from (?P<allowed>.*)\)", re.DOTALL
)
_TYPE = re.compile(r"argument (?P<name>.+?): invalid (?P<kind>\w+) value: '(?P<value>.*)'", re.DOTALL)
_ARGUMENT = re.compile(r"argument (?P<name>.+?): (?P<problem>.*)", re.DOTALL)
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "_token_ids": "token ids such as 13,198",
    "_logit_bias": "13:-1.5,198:2",
}
_PROBLEMS = {"expected one argument": "needs a value", "expected at least one argument": "needs a value"}


class CommandParser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse prints its usage and exits. Options may stand before, between and behind the rest.

    `further`: names of options that the command takes beside those of the parser, for suggestions.
    """

    def __init__(
        self, prog: str | None = None, *, further: Callable[[], Iterable[str]] = tuple, **keywords: Any
    ) -> None:
        super().__init__(prog, allow_abbrev=False, **keywords)
        self._further = further

    def parse_args(  # type: ignore[override]  # argparse has overloads for a namespace of the caller's type
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """What `args` say, options with dashes or underscores. Raises `ConfigError`."""
        words = list(args or ())
        end = words.index("--") if "--" in words else len(words)
        words = [*map(with_dashes, words[:end]), *words[end:]]
        if self._subparsers is not None:
            own, rest = self.parse_known_args(words)
        else:
            # What follows `--` is no option; argparse forgets that where options and words are mixed.
            own, rest = self.parse_known_intermixed_args([*words[:end], *(_PLAIN + word for word in words[end + 1 :])])
            _unmark(own)
        if rest:
            self._refuse(rest)
        return own

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` with argparse's `message` in our words."""
        raise ConfigError(_in_our_words(message))

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        unknown = next((word for word in rest if word.startswith("-") and word != "--"), None)
        if unknown is None:
            raise ConfigError(
                f"{_shown(rest[0].removeprefix(_PLAIN))}: unexpected argument; `{self.prog} --help` says what there is"
            )
        name = unknown.partition("=")[0]
        hint = nearest(name, self._known_options()) or f"; `{self.prog} --help` lists the options"
        raise ConfigError(f"{_shown(name)}: unknown option{hint}")

    def _known_options(self) -> list[str]:
        parsers: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        names = [name for parser in parsers for name in parser._option_string_actions if name.startswith("--")]
        return [*dict.fromkeys(names), *self._further()]


def _unmark(own: argparse.Namespace) -> None:
    for name, value in vars(own).items():
        if isinstance(value, str):
            setattr(own, name, value.removeprefix(_PLAIN))
        elif isinstance(value, list):
            setattr(own, name, [item.removeprefix(_PLAIN) if isinstance(item, str) else item for item in value])


def with_dashes(word: str) -> str:
    """An option's name with dashes, its value untouched: underscores are as good everywhere in Pagoda."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and len(name) > 2 else word


def settings_names() -> Iterable[str]:
    """The options that are settings, for commands that take those, too."""
    from pagoda.config.names import settings_by_name

    return ["--config", "--help-settings", *("--" + name.replace("_", "-") for name in settings_by_name())]


def _in_our_words(message: str) -> str:
    if match := _CHOICE.fullmatch(message):
        allowed = [word.strip().strip("'") for word in match["allowed"].split(",")]
        value = match["value"].strip("'")
        hint = nearest(value, allowed)
        return f"{match['name']}={_shown(value)}: must be {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}{hint}"
    if match := _TYPE.fullmatch(message):
        return f"{match['name']}={_shown(match['value'])}: must be {_KINDS.get(match['kind'], match['kind'])}"
    if match := _ARGUMENT.fullmatch(message):
        return f"{match['name']}: {_PROBLEMS.get(match['problem'], match['problem'])}"
    required = "the following arguments are required: "
    if message.startswith(required):
        return f"{message.removeprefix(required)}: is needed"
    return message


def _shown(value: str) -> str:
    return value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[: MAX_SHOWN_CHARACTERS - 3]}..."
