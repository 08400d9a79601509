"""Asks a running server what it is at, over its public routes, with whatever key there is."""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from pagoda.config.environment import CLIENT_KEY_VARIABLE
from pagoda.errors import PagodaError
from pagoda.monitoring.samples import Samples

DEFAULT_URL = "http://localhost:8080"
TIMEOUT_SECONDS = 5.0
MAX_ANSWER_BYTES = 16 * 2**20
MAX_LINE_BYTES = 4 * 2**20
_NOT_OURS = "the answer is not Pagoda's: another server listens there"


class SilentError(PagodaError):
    """Nothing answered; `what` happened instead: refused, timeout, name, tls, reset or http."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


KEY_HINT = f"give a key that may: --api-key, or {CLIENT_KEY_VARIABLE}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of a response."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body; None where it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def sentence(self) -> str:
        """What an error says, or its status."""
        content = self.json
        error = content.get("error") if isinstance(content, dict) else None
        text = error.get("message") if isinstance(error, dict) else error
        return str(text) if text else f"status {self.status}"


class Server:
    """A server at `url`. `key`: sent with every question."""

    def __init__(self, url: str, key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout

    @classmethod
    def of_options(cls, options: argparse.Namespace) -> Server:
        """The server that the options of `add_options` name."""
        return cls(options.base_url, options.api_key or os.environ.get(CLIENT_KEY_VARIABLE))

    def get(self, path: str) -> Answer:
        """The answer, of whatever status. Raises `SilentError`."""
        try:
            with self._open(path) as response:
                return Answer(response.status, response.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(MAX_ANSWER_BYTES))
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise silent(self.url, error) from None

    def events(self, seconds: float, *, kernels: bool = False) -> Generator[dict[str, Any], None, None]:
        """What `/ui/events` says for so long, the first event at once. Raises `SilentError`, `PagodaError` when refused."""
        try:
            with self._open("/ui/events?kernels=true" if kernels else "/ui/events") as stream:
                end = time.monotonic() + seconds
                while True:
                    line = stream.readline(MAX_LINE_BYTES)
                    if not line:
                        return
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
                        if time.monotonic() > end:
                            return
        except urllib.error.HTTPError as error:
            with error:
                hint = {404: " (the server runs with --no-ui)", 401: f"; {KEY_HINT}", 403: f"; {KEY_HINT}"}.get(
                    error.code, ""
                )
                sentence = Answer(error.code, error.read(MAX_ANSWER_BYTES)).sentence
                raise PagodaError(f"{self.url}/ui/events: {sentence}{hint}") from None
        except (OSError, ValueError) as error:
            raise silent(self.url, error) from None

    def _open(self, path: str) -> Any:
        return urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=self._headers), timeout=self._timeout
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and with which key it is asked."""
    parser.add_argument("--base-url", default=DEFAULT_URL, metavar="URL", help=f"of the server; default: {DEFAULT_URL}")
    parser.add_argument("--api-key", metavar="KEY", help=f"with scope read; also: {CLIENT_KEY_VARIABLE}")


def silent(url: str, error: Exception) -> SilentError:
    """What kept a server from answering, of what Python raised."""
    cause: object = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLError):
        return SilentError("tls", f"{url}: TLS failed: {cause.reason or cause}")
    if isinstance(cause, socket.gaierror):
        return SilentError("name", f"{url}: the name is not known: {cause.strerror}")
    if isinstance(cause, TimeoutError):
        return SilentError("timeout", f"{url}: no answer in time")
    if isinstance(cause, ConnectionRefusedError):
        return SilentError("refused", f"{url}: connection refused: nothing listens there")
    if isinstance(cause, ConnectionError):
        return SilentError("reset", f"{url}: the connection broke: {cause}")
    return SilentError("http", f"{url}: {cause}")


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """What a server said of itself at `time`, in monotonic seconds. `refusals`: what it did not say and why, by path.

    `health`: the body of `/health`, the public part of it without the scope `read`. `server`: the first event of
    `/ui/events`. `settings`: of `/settings`, by name. `info`: of `/server_info`.
    """

    url: str
    time: float
    health: dict[str, Any]
    health_status: int
    samples: Samples | None = None
    server: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The health of each model by its name, of a server of one model too."""
        if "models" in self.health:
            return {one["name"]: one for one in self.health["models"]}
        name = self.samples.models[0] if self.samples is not None and self.samples.models else "the model"
        return {name: self.health}

    def setting(self, name: str) -> Any:
        """The value of a setting; None where it is not known."""
        return self.settings.get(name, {}).get("value")


def look(server: Server) -> Snapshot:
    """`/health` and `/metrics`. Raises `SilentError`, and `ValueError` where another server answers."""
    answer = server.get("/health")
    health = answer.json
    if not isinstance(health, dict) or "state" not in health:
        raise ValueError(f"{server.url}: {_NOT_OURS}")
    found = Snapshot(url=server.url, time=time.monotonic(), health=health, health_status=answer.status)
    metrics = server.get("/metrics")
    if metrics.status == 200:
        found.samples = Samples(metrics.body.decode(errors="replace"))
    else:
        found.refusals["/metrics"] = metrics.sentence
    return found


def look_closely(server: Server) -> Snapshot:
    """All that a server says at once: also its settings, and the history of its health."""
    found = look(server)
    for path, take in (("/settings", "settings"), ("/server_info", "info")):
        answer = server.get(path)
        content = answer.json
        if answer.status == 200 and isinstance(content, dict):
            setattr(found, take, content["settings"] if take == "settings" else content)
        else:
            found.refusals[path] = answer.sentence
    try:
        with closing(server.events(0.0)) as events:
            found.server = next(events, None)
    except PagodaError as error:
        found.refusals["/ui/events"] = str(error)
    return found
