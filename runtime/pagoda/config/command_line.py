"""The settings on a command line, and the help text for them.

`--max-model-len 4096`, `--max_model_len=4096`, `--enable-prefix-caching`, `--no-enable-prefix-caching`,
`--enable-prefix-caching=false`. A setting given twice: the later one counts, as in a list of container arguments to which a
user appends; lists grow. `--config FILE` names the file source.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda.config.names import Given, nearest, normalized, settings_by_name
from pagoda.config.option import GROUPS
from pagoda.config.rules import Problem
from pagoda.config.schema import option_defaults, options, rules
from pagoda.config.values import format_bytes, is_boolean, is_list

CONFIG_FILE = "config"
_BOOLEAN_WORDS = ("true", "false")
_WIDTH = 100


@dataclass(slots=True)
class CommandLine:
    """The settings on a command line, in order, and what else was on it.

    `others` keeps, in order, every argument that is no setting; a command parses its own options out of it.
    """

    given: list[Given] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    config_file: str | None = None


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Take the settings out of `arguments`; values stay text. Everything after a bare `--` is left to the command."""
    line = CommandLine()
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            line.others.extend(arguments[position - 1 :])
            break
        written, equals, value = argument.partition("=")
        name, negated = _setting_name(written)
        if name is None:
            line.others.append(argument)
            continue
        boolean = name != CONFIG_FILE and is_boolean(settings_by_name()[name])
        if negated and equals:
            line.problems.append(Problem(written, value, "takes no value", "command line"))
        elif boolean and not equals:
            value = "false" if negated else "true"
            if not negated and position < len(arguments) and arguments[position].lower() in _BOOLEAN_WORDS:
                value = arguments[position]
                position += 1
        elif not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                line.problems.append(Problem(written, "", "needs a value", "command line"))
                continue
            value = arguments[position]
            position += 1
        if name == CONFIG_FILE:
            line.config_file = value
        else:
            line.given.append(Given(name, value, f"command line {written}"))
    return line


def unknown_arguments(line: CommandLine) -> list[Problem]:
    """Problems of a command that has no options of its own, one for each argument left over.

    Their values are not repeated, nor a loose word beside a secret: it may be a part of it.
    """
    secret_given = any(options()[given.key].secret for given in line.given)
    problems = []
    for argument in line.others:
        if argument.startswith("--") and argument != "--":
            written = argument.partition("=")[0]
            known = ["--" + name.replace("_", "-") for name in (*settings_by_name(), CONFIG_FILE)]
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
    if default == ():
        return "none"
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
