"""The settings of each model of a server that serves several: those of the server, and what the model's entry says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagoda.config.names import nearest, normalized, settings_by_name
from pagoda.config.option import OptionInfo
from pagoda.config.rules import Problem, raise_problems
from pagoda.config.schema import PagodaConfig, default_model_name, options, rules
from pagoda.config.values import plain_value
from pagoda.errors import ConfigError

CHECKPOINT_FILES = ("config.json", "modules.json")
GGUF = ".gguf"


def serves_several(config: PagodaConfig) -> bool:
    """Whether the server may serve more than one model."""
    return config.models is not None or config.model_dir_root is not None


def model_configs(config: PagodaConfig) -> dict[str, PagodaConfig]:
    """The settings of each model by its name, in order: entries of `models`, then what is found in `model_dir_root`.

    There may be none in `model_dir_root` yet. Raises `ConfigError` for an entry that is wrong, a name that two models have, or
    a list without any.
    """
    if not serves_several(config):
        return {config.served_model_name: config}
    found: dict[str, PagodaConfig] = {}
    problems: list[Problem] = []
    for name, entry in (config.models or {}).items():
        try:
            found[name] = of_model(config, name, entry)
        except ConfigError as error:
            problems.append(Problem(f"models.{name}", "", str(error)))
    for name, path in checkpoints_in(config.model_dir_root).items():
        if name not in found:
            found[name] = of_model(config, name, {"model": str(path)})
    taken: dict[str, str] = {}
    for name, each in found.items():
        for alias in dict.fromkeys((name, *each.model_aliases)):
            if alias in taken:
                problems.append(Problem("models", "", f"{taken[alias]} and {name} have the same name {alias}"))
            taken.setdefault(alias, name)
    problems += [
        Problem("load_models", name, f"there is no such model; there are {', '.join(found)}")
        for name in config.load_models
        if name not in found
    ]
    raise_problems(problems)
    if not found and config.model_dir_root is None:
        raise ConfigError("models: there is none in it")
    return found


def checkpoints_in(root: str | None) -> dict[str, Path]:
    """The checkpoints directly in a directory, by the names under which they are served."""
    if root is None:
        return {}
    try:
        entries = sorted(Path(root).expanduser().iterdir())
    except OSError as error:
        raise ConfigError(f"model_dir_root={root}: cannot be read: {error.strerror}") from error
    return {
        default_model_name(entry.name): entry
        for entry in entries
        if not entry.name.startswith(".")
        and (entry.suffix == GGUF or any((entry / name).is_file() for name in CHECKPOINT_FILES))
    }


def of_model(config: PagodaConfig, name: str, entry: Mapping[str, Any]) -> PagodaConfig:
    """The settings of the model `name`. Raises `ConfigError` for what an entry may not say."""
    base = replace(
        config,
        models=None,
        model_dir_root=None,
        load_models=(),
        load_on_demand=False,
        max_loaded_models=None,
        idle_unload_seconds=None,
        model=None,
        model_name=name,
        model_aliases=(),
        # A process for each model that is not there would take 0.3 GiB each.
        spare_process_seconds=None,
    )
    return changed(base, entry, lambda info: "is the server's: one for all models" if info.is_of_server else None)


def changed(
    config: PagodaConfig, changes: Mapping[str, Any], refusal: Callable[[OptionInfo], str | None]
) -> PagodaConfig:
    """`config` with `changes`, written as in a file. `refusal`: why a setting may not be among them, None where it may.

    Raises `ConfigError` with everything that is wrong: names, types, bounds, files, and what does not go together.
    """
    from pagoda.config.validation import typed_value

    values, problems = {key: getattr(config, key) for key in options()}, []
    for written, raw in changes.items():
        key = settings_by_name().get(normalized(str(written)))
        if key is None or key == "model_name":
            reason = "the name is the entry's" if key else "unknown setting" + nearest(str(written), settings_by_name())
            problems.append(Problem(str(written)[:80], "", reason))
        elif (reason_ := refusal(options()[key])) is not None:
            problems.append(Problem(key, "", reason_))
        else:
            try:
                values[key] = typed_value(key, plain_value(key, raw))
            except ValueError:
                problems.append(Problem(key, rules().shown(key, raw), f"must be {rules().allowed_values(key)}"))
    raise_problems(problems or rules().relation_problems(values) + rules().path_problems(values))
    return PagodaConfig(**values)
