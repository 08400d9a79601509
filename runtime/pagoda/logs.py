"""Logs: one handler, one format and one level for everything in the process, Pagoda's own lines and the libraries' alike.

A line carries the served model and, inside a request, the request's id. Keys never reach a line: configured secrets and
whatever follows `Bearer` are masked in the finished text, exception traces included. Standard library only, because the
engine process logs through it too.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

request_id_var: ContextVar[str | None] = ContextVar("pagoda_request_id", default=None)
trace_id_var: ContextVar[str | None] = ContextVar("pagoda_trace_id", default=None)
"""W3C's id of the trace that the current task's call is part of, where that is recorded (docs/traces.md)."""
model_name_var: ContextVar[str] = ContextVar("pagoda_model_name", default="")
"""The model that the current task's request asks for, once that is known; empty where the server has only one."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Pagoda's, and those of the servers that it runs, which come with handlers and levels of their own.
UNIFIED_LOGGERS = ("pagoda", "pagoda_kernels", "kserve", "kserve.trace")
ACCESS_LOGGER = "pagoda.access"
# Asked every few seconds by Kubernetes and Prometheus; a successful answer is not logged.
PROBE_PATHS = ("/health", "/v2/health/", "/metrics", "/ready", "/ping")
AUDIT_LOGGER = "pagoda.audit"
"""What administrators did; logged at every level."""
MASK = "***"
_COLORS = {logging.DEBUG: "2", logging.INFO: "32", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
_BEARER = re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+")
_WORD = re.compile(r"[^\s\"'`,;:=?&/()<>\[\]{}]{8,}")
_STANDARD_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class LogStream(Protocol):
    """What log lines are written to."""

    def write(self, text: str, /) -> int:
        """Write `text`."""

    def flush(self) -> None:
        """Write what is held back."""


@contextmanager
def bind_request_id(request_id: str) -> Iterator[None]:
    """Put `request_id` on every line logged inside the block, in this task and in tasks started there.

    A task that serves one request only may set `request_id_var` instead.
    """
    token = request_id_var.set(request_id)
    try:
        yield
    finally:
        request_id_var.reset(token)


def configure_logging(
    level: str = "info",
    log_format: Literal["text", "json"] = "text",
    *,
    model_name: str | None = None,
    secrets: Iterable[str] = (),
    is_secret: Callable[[str], bool] | None = None,
    quiet_paths: Collection[str] = (),
    access_log: bool = True,
    stream: LogStream | None = None,
    colors: bool = False,
) -> logging.Handler:
    """Send all logging of this process to `stream` (default: stderr) in one format; may be called again.

    `level` is one of `LEVELS` and governs Pagoda's and the servers' loggers; other libraries log from warning on.
    `secrets` are masked everywhere, and words for which `is_secret`. Requests of `quiet_paths` are not logged, without
    `access_log` none. `colors`: of levels, in text. Returns the handler.
    """
    threshold = LEVELS[level]
    handler: logging.StreamHandler[LogStream] = logging.StreamHandler(stream or sys.stderr)
    masks: dict[str, Any] = {"model_name": model_name, "secrets": secrets, "is_secret": is_secret}
    handler.setFormatter(JsonFormatter(**masks) if log_format == "json" else TextFormatter(**masks, colors=colors))
    handler.addFilter(_add_request_id)
    if threshold > logging.DEBUG:
        handler.addFilter(_is_no_probe)
    if quiet_paths:
        handler.addFilter(lambda record: _request_path(record) not in quiet_paths)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.WARNING))
    for name in UNIFIED_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.disabled = False
        logger.setLevel(threshold)
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.NOTSET if access_log else logging.WARNING)
    logging.captureWarnings(True)
    return handler


def set_level(level: str) -> None:
    """Log from `level` on, one of `LEVELS`, as `configure_logging` does."""
    threshold = LEVELS[level]
    logging.getLogger().setLevel(max(threshold, logging.WARNING))
    for name in UNIFIED_LOGGERS:
        logging.getLogger(name).setLevel(threshold)


class _MaskingFormatter(logging.Formatter):
    """What both formats share: the model's name, extra fields, and the mask over secrets."""

    def __init__(
        self,
        *,
        model_name: str | None = None,
        secrets: Iterable[str] = (),
        is_secret: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__()
        self._is_secret = is_secret
        self.model_name = model_name
        # Longest first: a key that begins another must not leave the other's rest behind.
        self._secrets = sorted((secret for secret in secrets if secret), key=len, reverse=True)

    def mask(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        if (is_secret := self._is_secret) is not None:
            text = _WORD.sub(lambda word: MASK if is_secret(word[0]) else word[0], text)
        return _BEARER.sub(rf"\1 {MASK}", text)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Request id first, then what the caller gave as `extra`."""
        request_id = getattr(record, "request_id", None)
        found: dict[str, Any] = {} if request_id is None else {"request_id": request_id}
        for name, value in record.__dict__.items():
            if name in _STANDARD_ATTRIBUTES or name.startswith("_"):
                continue  # private attributes of libraries
            if name not in found and value is not None:
                found[name] = value
        return found

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback and stack of a record, or an empty string."""
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


class TextFormatter(_MaskingFormatter):
    """`2026-01-31 12:00:00.123 INFO  pagoda.serving: message request_id=…`, for people."""

    def __init__(self, *, colors: bool = False, **masks: Any) -> None:
        super().__init__(**masks)
        self._colors = _COLORS if colors else {}

    def format(self, record: logging.LogRecord) -> str:
        """One line; further lines are indented, so that no message can pass for a record of its own."""
        moment = _moment(record)
        text = f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d} {self._level(record)} {record.name}: "
        text += record.getMessage().replace("\r", "\\r")
        for name, value in self.fields(record).items():
            text += f" {name}={value}"
        if trace := self.trace(record):
            text += "\n" + trace
        return self.mask(text.replace("\n", "\n    "))

    def _level(self, record: logging.LogRecord) -> str:
        name = f"{record.levelname:<7}"
        color = self._colors.get(record.levelno)
        return name if color is None else f"\x1b[{color}m{name}\x1b[0m"


class JsonFormatter(_MaskingFormatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, model, request_id, extras, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line. A value that JSON does not have is given as its text."""
        entry: dict[str, Any] = {
            "time": _moment(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (model_name := getattr(record, "model", self.model_name)) is not None:
            entry["model"] = model_name
        entry |= {name: value for name, value in self.fields(record).items() if name not in entry}
        if trace := self.trace(record):
            entry["exception"] = trace
        return json.dumps(self._masked(entry), ensure_ascii=False)

    def _masked(self, value: Any) -> Any:
        """`value` as JSON has it, without keys at any depth."""
        if isinstance(value, dict):
            return {self.mask(str(name)): self._masked(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._masked(inner) for inner in value]
        return value if value is None or isinstance(value, bool | int | float) else self.mask(str(value))


def _moment(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _add_request_id(record: logging.LogRecord) -> bool:
    if getattr(record, "request_id", None) is None:
        record.request_id = request_id_var.get()
    if (trace_id := trace_id_var.get()) is not None:
        record.trace_id = trace_id
    if model_name := model_name_var.get():
        record.model = model_name
    return True


def _request_path(record: logging.LogRecord) -> str | None:
    """The path of an access line (client, method, path, version, status); None of any other."""
    if record.name != ACCESS_LOGGER or not isinstance(record.args, tuple) or len(record.args) != 5:
        return None
    return str(record.args[2]).partition("?")[0]


def _is_no_probe(record: logging.LogRecord) -> bool:
    """False for the access line of a probe that succeeded."""
    path = _request_path(record)
    if path is None or not isinstance(record.args, tuple):
        return True
    status = record.args[4]
    is_probe = path.startswith(PROBE_PATHS) or path.endswith("/ready")
    return not (is_probe and isinstance(status, int) and status < 400)
