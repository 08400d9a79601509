"""Files of API keys: one key a line, a list of records in YAML or JSON, or a directory of such files, as a Secret is mounted.

    # one a line                    - name: alice                        /etc/keys/alice   (a key: its name is the file's)
    3f1c…                             key: 3f1c…                         /etc/keys/ops     (a record)
    sha256:9f86…                    - name: prometheus
                                      sha256: 9f86…
                                      scopes: [read]

No message of an error holds a key.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagoda.config.file import unique_key_loader
from pagoda.config.sizes import exact_bytes
from pagoda.errors import ConfigError
from pagoda.serving.auth.keys import ApiKey, KeySet, nameless_key, parse_digest, parse_secret
from pagoda.serving.auth.scopes import Scope
from pagoda.tenants import TenantLimits

MAX_FILE_BYTES = 4 * 2**20
MAX_FILES = 10_000
MAX_NAME_CHARACTERS = 100

KEYS_MEMBER = "keys"
_FIELDS = ("name", "key", "sha256", "scopes", "tenant", "weight", "requests_per_minute", "tokens_per_minute")
_CURRENT = "..data"  # what the kubelet makes a volume's files links to, and swaps when the Secret has changed


def read_contents(path: Path) -> dict[str, bytes]:
    """The files at `path` by their names: one, or those of a directory but hidden ones, all of the same moment.

    Raises `ConfigError` for what cannot be read, is too large, or is none.
    """
    try:
        if not path.is_dir():
            return {path.name: _read(path)}
        # A volume is read where its link points now: file by file, it might be half of the old and half of the new.
        directory = (path / _CURRENT).resolve() if (path / _CURRENT).is_dir() else path
        files = sorted(entry for entry in directory.iterdir() if entry.name[0] != "." and entry.is_file())
        if len(files) > MAX_FILES:
            raise ConfigError(f"{path} has {len(files)} files; at most {MAX_FILES} are read")
        return {file.name: _read(file) for file in files}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_contents(path: Path, contents: dict[str, bytes]) -> KeySet:
    """The keys in what `read_contents` gave for `path`. Raises `ConfigError`, also where there is no key at all."""
    is_directory = path.is_dir()
    keys: list[ApiKey] = []
    for name, content in contents.items():
        where = str(path / name) if is_directory else str(path)
        keys += _parse_file(content, where, name if is_directory else None)
    if not keys:
        raise ConfigError(f"{path} holds no API key; a server that needs none is given no file of keys")
    try:
        return KeySet(keys)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    # Without waiting for a writer, should it be a FIFO.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path} is no file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {exact_bytes(MAX_FILE_BYTES)}")
    return content


def _parse_file(content: bytes, where: str, file_name: str | None) -> list[ApiKey]:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8") from None
    if _is_structured(text, where):
        return list(_records(_load(text, where), where, file_name))
    lines = [line.strip() for line in text.splitlines()]
    words = [(number, word.strip()) for number, line in enumerate(lines, 1) for word in _words(line)]
    keys = [_plain_key(word, f"{where}: line {number}") for number, word in words]
    return [_named(keys[0], file_name)] if file_name is not None and len(keys) == 1 else keys


def _words(line: str) -> list[str]:
    """The keys of a line: several may be separated by commas, as in PAGODA_API_KEYS."""
    return [] if not line or line.startswith("#") else line.split(",")


def _plain_key(word: str, where: str) -> ApiKey:
    try:
        return nameless_key(parse_secret(word))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _named(key: ApiKey, name: str) -> ApiKey:
    return ApiKey(name=_name(name, name), digest=key.digest, tenant=name)


def _is_structured(text: str, where: str) -> bool:
    """Whether a file is YAML or JSON, by its name or by how it begins. A key begins with none of these."""
    if where.endswith((".yaml", ".yml", ".json")):
        return True
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    return first.startswith(("[", "{", "- ", "---")) or first.split(":")[0].rstrip() in (KEYS_MEMBER, *_FIELDS[:2])


def _load(text: str, where: str) -> Any:
    import yaml

    try:
        return json.loads(text) if text.startswith(("[", "{")) else yaml.load(text, unique_key_loader(where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON: line {error.lineno}, column {error.colno}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}: is not YAML{place}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{where}: is not YAML") from None


def _records(content: Any, where: str, file_name: str | None) -> Iterator[ApiKey]:
    if isinstance(content, dict) and content.keys() == {KEYS_MEMBER}:
        content = content[KEYS_MEMBER]
    if isinstance(content, dict):
        yield _record(content, where, file_name)
        return
    if not isinstance(content, list):
        raise ConfigError(f"{where}: must be a list of records, or a mapping with the member {KEYS_MEMBER}")
    for number, record in enumerate(content, 1):
        entry = f"{where}: key {number}"
        if isinstance(record, str):
            yield _plain_key(record.strip(), entry)
        elif isinstance(record, dict):
            yield _record(record, entry, None)
        else:
            raise ConfigError(f"{entry}: must be a record with {', '.join(_FIELDS)}, or a key in quotes")


def _record(record: dict[Any, Any], where: str, file_name: str | None) -> ApiKey:
    for field in record.keys() - set(_FIELDS):
        near = difflib.get_close_matches(str(field), _FIELDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: has an unknown field{hint} Fields are {', '.join(_FIELDS)}")
    if (record.get("key") is None) == (record.get("sha256") is None):
        raise ConfigError(f"{where}: give either key or sha256")
    secret = record.get("key") if record.get("sha256") is None else record["sha256"]
    if not isinstance(secret, str):
        raise ConfigError(f"{where}: key and sha256 must be strings: put what looks like a number into quotes")
    try:
        digest = (
            parse_secret(secret.strip())
            if record.get("sha256") is None
            else parse_digest(secret.strip().removeprefix("sha256:"))
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    plain = nameless_key(digest)
    name = _name(record.get("name", file_name or plain.name), f"{where}: name")
    return ApiKey(
        name=name,
        digest=digest,
        scopes=_scopes(record["scopes"], where) if "scopes" in record else plain.scopes,
        tenant=_name(record.get("tenant", name), f"{where}: tenant"),
        limits=TenantLimits(
            weight=_weight(record.get("weight", 1.0), where),
            requests_per_minute=_rate(record, "requests_per_minute", where),
            tokens_per_minute=_rate(record, "tokens_per_minute", where),
        ),
    )


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise ConfigError(f"{where}: must be 1 to {MAX_NAME_CHARACTERS} printable characters")
    return value


def _scopes(value: Any, where: str) -> frozenset[Scope]:
    known = ", ".join(Scope)
    if not isinstance(value, list) or not value or not all(scope in tuple(Scope) for scope in value):
        raise ConfigError(f"{where}: scopes must be a list of some of {known}")
    return frozenset(map(Scope, value))


def _weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ConfigError(f"{where}: weight must be a number greater than 0 and at most 1000")
    return float(value)


def _rate(record: dict[Any, Any], field: str, where: str) -> int | None:
    value = record.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{where}: {field} must be an integer of at least 1, or left out for no limit")
    return value
