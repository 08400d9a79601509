"""The settings on a command line, and the help text for them.

`--max-model-len 4096`, `--max_model_len=4096`, `--enable-prefix-caching`, `--no-enable-prefix-caching`,
`--enable-prefix-caching=false`. A setting given twice: the later one counts, as in a list of container arguments to which a
user appends; lists grow. `--config FILE` names the file source. A server takes vLLM's command line, too: see `vllm_flags`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.config.names import Given, nearest, normalized, settings_by_name
from pagoda.config.option import GROUPS
from pagoda.config.rules import Problem
from pagoda.config.schema import option_defaults, options, rules
from pagoda.config.values import format_bytes, is_boolean, is_list
from pagoda.config.vllm_flags import SHORT, as_written_for_vllm, dotted_value, vllm_flags

CONFIG_FILE = "config"
_BOOLEAN_WORDS = ("true", "false")
# Settings that vLLM takes several words for, and which those after the first are for.
_SEVERAL_WORDS = {
    "served_model_name": "model_aliases",
    "lora_modules": "lora_modules",
    "collect_detailed_traces": "collect_detailed_traces",
}
_WIDTH = 100


@dataclass(slots=True)
class CommandLine:
    """The settings on a command line, in order, and what else was on it.

    `others` keeps, in order, every argument that is no setting; a command parses its own options out of it. `notes`: flags of
    vLLM that have no effect here, a sentence each.
    """

    given: list[Given] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    config_file: str | None = None
    notes: list[str] = field(default_factory=list)

    def take_model(self) -> None:
        """Take the first loose word for the model, as in `vllm serve MODEL`."""
        for index, argument in enumerate(self.others):
            if not argument.startswith("-"):
                self.given.append(Given("model", argument, "command line"))
                del self.others[index]
                return


def parse_command_line(arguments: Sequence[str], *, vllm: bool = False) -> CommandLine:
    """Take the settings out of `arguments`; values stay text. Everything after a bare `--` is left to the command.

    `vllm`: the flags of `vllm serve` are known, too, and values may be written as there.
    """
    line = CommandLine()
    words = _Words(arguments)
    members: dict[str, dict[str, Any]] = {}
    while words:
        argument = words.take()
        if argument == "--":
            line.others.extend([argument, *words.rest()])
            break
        written, equals, value = _long_form(argument).partition("=") if vllm else argument.partition("=")
        name, negated = _setting_name(written)
        if name is None:
            if not vllm or not _take_vllm_flag(line, words, members, written, value if equals else None):
                line.others.append(argument)
            continue
        boolean = name != CONFIG_FILE and is_boolean(settings_by_name()[name])
        if negated and equals:
            line.problems.append(Problem(written, value, "takes no value", "command line"))
        elif boolean and not equals:
            value = "false" if negated else "true"
            if not negated and words.next.lower() in _BOOLEAN_WORDS:
                value = words.take()
        elif not equals:
            if not words or words.next.startswith("--"):
                line.problems.append(Problem(written, "", "needs a value", "command line"))
                continue
            value = words.take()
        source = f"command line {written}"
        if name == CONFIG_FILE:
            line.config_file = value
            continue
        line.given.append(Given(name, as_written_for_vllm(settings_by_name()[name], value) if vllm else value, source))
        if vllm and name in _SEVERAL_WORDS:
            line.given += [Given(_SEVERAL_WORDS[name], json.dumps([word]), source) for word in words.values()]
    line.given += [Given(name, json.dumps(value), f"command line --{name}.…") for name, value in members.items()]
    return line


class _Words:
    """The words of a command line that are not read yet."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._words)

    @property
    def next(self) -> str:
        return self._words[self._position] if self else ""

    def take(self) -> str:
        self._position += 1
        return self._words[self._position - 1]

    def values(self) -> list[str]:
        """The words before the next flag."""
        found = []
        while self and not self.next.startswith("-"):
            found.append(self.take())
        return found

    def rest(self) -> list[str]:
        return self._words[self._position :]


def _long_form(argument: str) -> str:
    """`-tp`, `-tp=2` and `-O3` with the long names of the flags; anything else as it is."""
    written, equals, value = argument.partition("=")
    if written in SHORT:
        return f"--{SHORT[written]}{equals}{value}"
    return f"--{SHORT['-O']}={written[2:]}" if re.fullmatch(r"-O\d", written) else argument


def _take_vllm_flag(
    line: CommandLine, words: _Words, members: dict[str, dict[str, Any]], written: str, value: str | None
) -> bool:
    """Do with a flag of vLLM what its table says; False for one that vLLM has not either."""
    if not written.startswith("--"):
        return False
    name, _, member = written[2:].partition(".")
    name = normalized(name)
    negated = name.startswith("no_") and name.removeprefix("no_") in vllm_flags()
    flag = vllm_flags().get(name.removeprefix("no_") if negated else name)
    key = settings_by_name().get(name)
    if member and (flag is not None or key is not None):
        if value is None and not words:
            line.problems.append(Problem(written, "", "needs a value", "command line"))
            return True
        value = words.take() if value is None else value
        if flag is None:
            members.setdefault(name, {})[member] = dotted_value(value)
            return True
    if flag is None:
        return False
    values = [] if value is None else [value]
    if value is None and not member and flag.values != "none":
        values = (
            words.values()
            if flag.values == "many"
            else [words.take()]
            if not words.next.startswith("--") and words
            else []
        )
    if not values and flag.values in ("one", "many"):
        line.problems.append(Problem(written, "", "needs a value", "command line"))
    elif flag.setting:
        line.given += [Given(flag.setting, text, f"command line {written}") for text in values]
    elif flag.refused and not negated and not (values and all(map(flag.is_harmless, values))):
        line.problems.append(Problem(written, " ".join(values)[:80], f"is not supported: {flag.why}", "command line"))
    elif not flag.refused:
        line.notes.append(f"{written} has no effect: {flag.why}")
    return True


def unknown_arguments(line: CommandLine, flags: Sequence[str] = ()) -> list[Problem]:
    """Problems of a command that takes settings, one for each argument left over; `flags`: options of its own.

    Their values are not repeated, nor a loose word beside a secret: it may be a part of it. A word behind an unknown option is
    its value.
    """
    secret_given = any(options()[given.key].secret for given in line.given)
    problems = []
    for before, argument in zip(["", *line.others], line.others, strict=False):
        if before.startswith("--") and "=" not in before and before != "--" and not argument.startswith("-"):
            continue
        if argument.startswith("--") and argument != "--":
            written = argument.partition("=")[0]
            known = [*flags, *("--" + name.replace("_", "-") for name in (*settings_by_name(), CONFIG_FILE, "help"))]
            problem = Problem(written, "", "unknown option" + nearest(written.replace("_", "-"), known), "command line")
        else:
            text = "an argument" if secret_given else argument
            problem = Problem(text, "", "unexpected; every setting has a name, as in --model DIR", "command line")
        problems.append(problem)
    return problems


def options_help() -> str:
    """The settings by group, for `--help`."""
    parts = []
    for group, title in GROUPS.items():
        parts.append(f"{title}:")
        for key, info in options().items():
            if info.group == group:
                parts.append(_option_help(key))
        parts.append("")
    return "\n".join(parts)


def default_text(key: str) -> str:
    """The default of a setting as people write it: `auto`, `none`, `32.00 MiB`, `true`."""
    default, info = option_defaults()[key], options()[key]
    if default is None:
        return "auto" if info.auto else "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    if info.unit == "bytes":
        return format_bytes(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _setting_name(written: str) -> tuple[str | None, bool]:
    """The accepted name that `--written` spells (None: it is no setting), and whether it is negated (`--no-…`)."""
    if not written.startswith("--"):
        return None, False
    name = normalized(written[2:])
    if name == CONFIG_FILE or name in settings_by_name():
        return name, False
    positive = name.removeprefix("no_")
    key = settings_by_name().get(positive)
    return (positive, True) if positive != name and key is not None and is_boolean(key) else (None, False)


def _option_help(key: str) -> str:
    info = options()[key]
    dashed = key.replace("_", "-")
    flag = f"--[no-]{dashed}" if is_boolean(key) else f"--{dashed} {_placeholder(key)}"
    text = f"{info.help} [default: {default_text(key)}]"
    if info.aliases:
        text += " Also: " + ", ".join("--" + alias.replace("_", "-") for alias in info.aliases)
    body = textwrap.fill(text, _WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)
    return f"  {flag}\n{body}"


def _placeholder(key: str) -> str:
    names = rules().choices(key)
    if names:
        return "{" + ",".join(names) + "}"
    return {"bytes": "BYTES", "seconds": "SECONDS", "tokens": "TOKENS", "": "VALUE"}[options()[key].unit] + (
        "[,…]" if is_list(key) else ""
    )
