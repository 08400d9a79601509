"""The settings in a file: a flat YAML or JSON mapping from name to value. A server takes vLLM's files, too."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.config.command_line import CommandLine, parse_command_line
from pagoda.config.names import Given, nearest, normalized, settings_by_name
from pagoda.config.rules import Problem
from pagoda.config.vllm_flags import as_written_for_vllm
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_file(path: str, *, vllm: bool = False) -> CommandLine:
    """Settings of the file `path` and a problem for every key that is none.

    `vllm`: keys may be flags of `vllm serve`, and values written as there; what has no effect is in the notes.
    Raises:
        ConfigError: the file cannot be read, is no YAML or JSON, or holds something else than a mapping.
    """
    source = f"file {path}"
    found = CommandLine()
    for written, value in _load(path).items():
        name = normalized(str(written))
        if name in settings_by_name() and not (vllm and name == _NAMES and isinstance(value, list)):
            is_text = vllm and isinstance(value, str)
            found.given.append(
                Given(name, as_written_for_vllm(settings_by_name()[name], value) if is_text else value, source)
            )
            continue
        line = parse_command_line(_as_words(str(written), value), vllm=True) if vllm else CommandLine(others=[name])
        if line.others:
            problem = "unknown setting" + nearest(name, settings_by_name())
            found.problems.append(Problem(str(written), "", problem, source))
            continue
        found.given += [replace(given, source=source) for given in line.given]
        found.problems += [replace(problem, key=str(written), source=source) for problem in line.problems]
        found.notes += line.notes
    return found


_NAMES = "served_model_name"  # of which vLLM takes several


def _as_words(name: str, value: Any) -> list[str]:
    """An entry as the words of a command line, as vLLM makes them of its files."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(item if isinstance(item, str) else json.dumps(item, default=str) for item in values)]


def _load(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config={path}: cannot be read: {error}") from error
    content = _parse_json(path, text) if path.endswith(".json") else _parse_yaml(path, text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config={path}: must hold a mapping from settings to values, not {type(content).__name__}")
    return content


def _parse_json(path: str, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_duplicates(f"--config={path}", [key for key, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config={path}: is not JSON: {error}") from error


def _parse_yaml(path: str, text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, unique_key_loader(f"--config={path}"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config={path}: is not YAML: {' '.join(str(error).split())}") from error


def unique_key_loader(where: str) -> type[yaml.SafeLoader]:
    """A safe loader of YAML that refuses a key given twice, of which YAML would silently keep the last.

    It raises `ConfigError`, whose message begins with `where`.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            _refuse_duplicates(where, [key.value for key, _ in node.value])
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


def _refuse_duplicates(where: str, keys: list[Any]) -> None:
    seen = set()
    for key in map(str, keys):
        if normalized(key) in seen:
            raise ConfigError(f"{where}: {key} is given twice")
        seen.add(normalized(key))
