"""Where settings come from, and their order: command line > file > environment > defaults.

Every source is read whole and everything that is wrong in any of them is reported in one error, before anything heavy loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pagoda.config.command_line import CommandLine, parse_command_line, unknown_arguments
from pagoda.config.environment import CONFIG_FILE_VARIABLE, EMPTY, read_environment
from pagoda.config.file import read_file
from pagoda.config.names import Given, nearest, normalized, settings_by_name
from pagoda.config.rules import Problem, raise_problems
from pagoda.config.schema import PagodaConfig, default_model_name, is_hub_id, option_defaults, options, rules
from pagoda.config.values import is_list, plain_value

VLLM_PORT = 8000


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration in effect and where each of its values came from.

    `sources` has one entry a setting: `command line --dtype`, `file /etc/pagoda.yaml`, `environment PAGODA_DTYPE`, `default`,
    or `derived` for a `model_name` made from the model. `notes`: what to log, of flags of vLLM that have no effect. `file`:
    the configuration file that was read.
    """

    config: PagodaConfig
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    file: str | None = None


def load(
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    vllm: bool = False,
    defaults: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
) -> LoadedConfig:
    """Read all sources. `arguments`: a command line of settings only; `environ`: the process's own if None.

    `vllm`: the command line may be one of `vllm serve`, its first word the model. `defaults`: in place of the schema's.
    `flags`: options that the command has itself, for suggestions.
    Raises:
        ConfigError: one message with every unknown name, wrong type, impossible value or contradiction in any source.
    """
    from pagoda.config.validation import typed_value

    line = parse_command_line(arguments, vllm=vllm)
    if vllm:
        line.take_model()
    given, problems = gather(line, os.environ if environ is None else environ, vllm=vllm)
    problems = unknown_arguments(line, flags) + problems
    values = option_defaults() | dict(defaults or {})
    sources = dict.fromkeys(values, "default")
    for key, value in given.items():
        try:
            values[key] = typed_value(key, plain_value(key, value.raw))
            sources[key] = value.source
            if options()[key].guards and not values[key]:
                problems.append(Problem(value.name, "", EMPTY, value.source))
        except ValueError:
            problems.append(_wrong(value))
    between = rules().relation_problems(values) + rules().path_problems(values)
    problems.extend(replace(problem, source=sources[problem.key]) for problem in between)
    raise_problems(problems)
    if values["model_name"] is None:
        sources["model_name"] = "derived"
    file = line.config_file or (os.environ if environ is None else environ).get(CONFIG_FILE_VARIABLE)
    return LoadedConfig(_with_name(values), sources, tuple(line.notes), file)


def load_as_vllm(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> LoadedConfig:
    """As `load`, with the defaults that manifests made for vLLM rely on: port 8000, and the model's name as it is written.

    Beside an `--api-key` metrics are read without one, as Prometheus and llm-d's picker do.
    """
    loaded = load(arguments, environ, vllm=True, defaults={"http_port": VLLM_PORT})
    if loaded.config.api_keys and loaded.sources["anonymous_scopes"] == "default":
        sources = {**loaded.sources, "anonymous_scopes": loaded.sources["api_keys"]}
        loaded = replace(loaded, config=replace(loaded.config, anonymous_scopes=("read",)), sources=sources)
    config = loaded.config
    if loaded.sources["model_name"] != "derived" or config.model is None:
        return loaded
    aliases = tuple(alias for alias in config.model_aliases if alias != config.model)
    return replace(loaded, config=replace(config, model_name=config.model, model_aliases=aliases))


def from_kwargs(arguments: Mapping[str, Any]) -> PagodaConfig:
    """The configuration of a Python caller: `arguments` over the defaults, aliases and sizes such as "2GiB" included.

    Files and the environment are not read and pydantic is not needed; apart from sizes, a value must have its type.

    Raises:
        ConfigError: as `load`.
    """
    problems, pairs = [], []
    for written, raw in arguments.items():
        if normalized(written) in settings_by_name():
            pairs.append(Given(normalized(written), raw, f"argument {written}"))
        else:
            suggestion = nearest(normalized(written), settings_by_name())
            problems.append(Problem(written, "", "unknown setting" + suggestion, "argument"))
    given, contradictions = _by_setting(pairs)
    values = option_defaults() | {}
    for key, value in given.items():
        try:
            values[key] = plain_value(key, value.raw)
        except ValueError:
            problems.append(_wrong(value))
    problems += contradictions + rules().value_problems(values)
    raise_problems(problems or rules().path_problems(values))
    return _with_name(values)


def gather(
    line: CommandLine, environ: Mapping[str, str], *, vllm: bool = False
) -> tuple[dict[str, Given], list[Problem]]:
    """The value of every setting that is given, from the first source that gives it; types are not checked yet.

    `vllm`: the file may be one of vLLM; its notes are added to those of `line`.
    """
    path = line.config_file or environ.get(CONFIG_FILE_VARIABLE)
    in_order = [(line.given, line.problems)]
    if path:
        file = read_file(path, vllm=vllm)
        in_order.append((file.given, file.problems))
        line.notes += file.notes
    in_order.append(read_environment(environ))
    winners: dict[str, Given] = {}
    problems = []
    for pairs, found in in_order:
        of_source, contradictions = _by_setting(pairs)
        winners = of_source | winners
        problems += found + contradictions
    return winners, problems


def _by_setting(pairs: Iterable[Given]) -> tuple[dict[str, Given], list[Problem]]:
    """One source's values by setting: the later wins and lists grow, but two names of a setting must not differ."""
    given: dict[str, Given] = {}
    problems = []
    for value in pairs:
        earlier = given.get(value.key)
        if earlier is not None and earlier.name != value.name and earlier.raw != value.raw:
            other = (
                f"contradicts {earlier.name}={rules().shown(value.key, earlier.raw)}, another name of the same setting"
            )
            problems.append(Problem(value.name, rules().shown(value.key, value.raw), other, value.source))
        elif earlier is not None and is_list(value.key):
            value = _joined(earlier, value)
        given[value.key] = value
    return given, problems


def _joined(earlier: Given, later: Given) -> Given:
    """Both lists in one; of two texts the one that is no list, for the check of its value to report."""
    items: list[str] = []
    for given in (earlier, later):
        try:
            items.extend(plain_value(given.key, given.raw))
        except ValueError:
            return given
    return replace(later, raw=items)


def _wrong(value: Given) -> Problem:
    return Problem(
        value.name, rules().shown(value.key, value.raw), f"must be {rules().allowed_values(value.key)}", value.source
    )


def _with_name(values: dict[str, Any]) -> PagodaConfig:
    """The configuration with its `model_name` derived from the model where none is given.

    A model of the Hugging Face hub keeps its id as an alias: that is what its clients call it elsewhere.
    """
    model, name = values["model"], values["model_name"]
    if name is None and model is not None and is_hub_id(model):
        values = {**values, "model_aliases": tuple(dict.fromkeys((*values["model_aliases"], model)))}
    return PagodaConfig(**{**values, "model_name": name or default_model_name(model)})
