"""`pagoda config`: the settings of a running server: get them, set those that can change, and see what differs.

pagoda config get [NAME ...]            value and source
pagoda config set NAME=VALUE ...        all of them, or none
pagoda config diff [FILE]               what is not the default, or what differs from a configuration file
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from pagoda.cli.parser import CommandParser
from pagoda.config.environment import CLIENT_KEY_VARIABLE
from pagoda.config.names import nearest, normalized, settings_by_name
from pagoda.errors import ConfigError, PagodaError

DEFAULT_URL = "http://localhost:8080"
TIMEOUT_SECONDS = 60.0
MAX_ANSWER_BYTES = 4 * 2**20


class AnswerError(PagodaError):
    """The server did not answer, or refused; the message is its own."""


def run(arguments: Sequence[str]) -> int:
    """Print what was asked; exit status 1 where `diff` has found a difference."""
    parser = CommandParser(prog="pagoda config", description="Settings of a running server.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="get|set|diff")
    own = {
        "get": actions.add_parser("get", help="value and source of settings"),
        "set": actions.add_parser("set", help="change settings: all of them, or none"),
        "diff": actions.add_parser("diff", help="what is not the default, or differs from a file"),
    }
    own["get"].add_argument("names", nargs="*", metavar="NAME", help="all if none is given")
    own["set"].add_argument("changes", nargs="+", metavar="NAME=VALUE", help="a value as in a configuration file")
    own["diff"].add_argument("file", nargs="?", metavar="FILE", help="a configuration file")
    for each in own.values():
        each.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server; default: {DEFAULT_URL}")
        each.add_argument("--model", metavar="NAME", help="one of several models; default: the server, and all of them")
        each.add_argument(
            "--api-key", metavar="KEY", help=f"with scope read, or admin for set; also: {CLIENT_KEY_VARIABLE}"
        )
        each.add_argument("--json", action="store_true", help="the answer as it is")
    options = parser.parse_args(list(arguments))
    server = _Server(options.base_url, options.model, options.api_key or os.environ.get(CLIENT_KEY_VARIABLE))
    if options.action == "set":
        return _set(server, options.changes, as_json=options.json)
    answer = server.ask("GET")
    if options.action == "get":
        return _get(answer, options.names, as_json=options.json)
    return _diff(answer["settings"], options.file, as_json=options.json)


def _get(answer: Mapping[str, Any], names: Sequence[str], *, as_json: bool) -> int:
    chosen = {name: answer["settings"][name] for name in _known(names, answer["settings"])}
    if as_json:
        print(json.dumps({**answer, "settings": chosen}, indent=2))
        return 0
    for name, one in chosen.items():
        print(f"{name} = {_shown(one['value'])}  ({one['source']}; {one['note']})")
    return 0


def _set(server: _Server, words: Sequence[str], *, as_json: bool) -> int:
    changes: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{name}: write NAME=VALUE")
        changes[normalized(name.lstrip("-"))] = value
    answer = server.ask("PATCH", changes)
    if as_json:
        print(json.dumps(answer, indent=2))
        return 0
    for name, one in answer["changed"].items():
        print(f"{name}: {_shown(one['before'])} -> {_shown(one['after'])}")
    print(f"generation {answer['generation']}" if answer["changed"] else "nothing has changed")
    return 0


def _diff(settings: Mapping[str, Mapping[str, Any]], file: str | None, *, as_json: bool) -> int:
    wanted: dict[str, Any] = {name: one["default"] for name, one in settings.items()}
    if file is not None:
        from pagoda.config.file import read_file
        from pagoda.config.validation import typed_value
        from pagoda.config.values import plain_value

        given = read_file(file, vllm=True).given
        wanted = {one.key: _json_form(typed_value(one.key, plain_value(one.key, one.raw))) for one in given}
    found = {
        name: {"running": settings[name]["value"], "wanted": value, **settings[name]}
        for name, value in wanted.items()
        if name in settings and settings[name]["value"] != value and settings[name]["value"] != "<secret>"
    }
    if as_json:
        print(json.dumps(found, indent=2))
    for name, one in found.items() if not as_json else ():
        print(f"{name}: {_shown(one['wanted'])} -> {_shown(one['running'])}  ({one['source']}; {one['note']})")
    return 1 if found else 0


def _json_form(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _known(names: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The settings that are asked for. Raises `ConfigError` for one that is not there."""
    found = []
    for written in names:
        key = settings_by_name().get(normalized(written.lstrip("-")))
        if key is None or key not in settings:
            raise ConfigError(f"{written}: unknown setting{nearest(normalized(written), settings)}")
        found.append(key)
    return found or list(settings)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Server:
    """Asks one server. Raises `AnswerError` with the server's own sentence where it refuses."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        query = "" if model is None else "?" + urlencode({"model": model})
        self._url = f"{url.rstrip('/')}/settings{query}"
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def ask(self, method: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url, data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                found = json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise AnswerError(_sentence(error.read(MAX_ANSWER_BYTES)) or f"{self._url}: status {error.code}") from None
        except (OSError, ValueError) as error:
            raise AnswerError(f"{self._url}: {error}") from None
        if not isinstance(found, dict) or not {"settings", "changed"} & found.keys():
            raise AnswerError(f"{self._url}: the answer is not Pagoda's")
        return found


def _sentence(body: bytes) -> str:
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError):
        return ""
    return str(error.get("message") if isinstance(error, dict) else error)
