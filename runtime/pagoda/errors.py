"""Every error that Pagoda raises on purpose.

Each class has a kind, independent of protocols: `serving.status` maps a kind to an HTTP status
and a gRPC code in one place. The engine raises these too. A message names what is wrong and
what is allowed, and is sent to the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import StrEnum

MAX_SHOWN_CHARACTERS = 80


class ErrorKind(StrEnum):
    """The kind of an error, as sent between processes."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limit_exceeded"
    NOT_SUPPORTED = "unsupported_parameter"
    NOT_READY = "not_ready"
    ENGINE_DEAD = "engine_dead"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERNAL = "internal"


def shown(value: object) -> str:
    """A value of a request for an error message, a line at most; of containers the type: they may be huge or deep."""
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, str | bytes | bytearray):
        value = value[: MAX_SHOWN_CHARACTERS + 1]
    elif isinstance(value, Sequence | Set):
        return "a list"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."


class PagodaError(Exception):
    """Base of all errors below; `str(error)` is the message for the client."""

    kind = ErrorKind.INTERNAL


class InvalidRequestError(PagodaError):
    """The request is invalid; a retry without a change will fail again.

    `param` names the offending field (as the client spelled it) where there is one.
    """

    kind = ErrorKind.INVALID_REQUEST

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt and completion do not fit the model's context.

    litellm and langchain look for the kind, or for the words that the message begins with, and try another model.
    """

    kind = ErrorKind.CONTEXT_LENGTH_EXCEEDED

    def __init__(self, problem: str, param: str | None = None, max_model_len: int | None = None) -> None:
        length = "exceeded" if max_model_len is None else f"{max_model_len} tokens"
        super().__init__(f"This model's maximum context length is {length}: {problem}", param)


class AuthenticationError(PagodaError):
    """No API key was sent, or one that is not known."""

    kind = ErrorKind.UNAUTHENTICATED


class PermissionDeniedError(PagodaError):
    """The API key is known and does not have the scope that this needs."""

    kind = ErrorKind.PERMISSION_DENIED


class ModelNotFoundError(PagodaError):
    """A model, version or route that is not served here."""

    kind = ErrorKind.NOT_FOUND


class RequestTooLargeError(PagodaError):
    """A body, message or header beyond its configured limit."""

    kind = ErrorKind.TOO_LARGE


class NotSupportedError(PagodaError):
    """A known feature that this server does not have; `param` names the field that asks for it where there is one."""

    kind = ErrorKind.NOT_SUPPORTED

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(PagodaError):
    """The bounded waiting queue is full; try again after `retry_after_seconds`."""

    kind = ErrorKind.QUEUE_FULL

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RateLimitError(PagodaError):
    """An API key has used what it may use in a minute; try again after `retry_after_seconds`. `limit`: requests or tokens."""

    kind = ErrorKind.RATE_LIMITED

    def __init__(self, message: str, limit: str = "requests", retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds


class EngineNotReadyError(PagodaError):
    """The engine is loading or draining; another replica, or this one later, can serve the request."""

    kind = ErrorKind.NOT_READY


class EngineDeadError(PagodaError):
    """The engine died while the request was in it; the request may be retried.

    `was_killed`: by an external SIGKILL, so no request in it was the cause. `may_have_run`: else it was waiting in the queue.
    """

    kind = ErrorKind.ENGINE_DEAD

    def __init__(self, message: str, *, was_killed: bool = False, may_have_run: bool = True) -> None:
        super().__init__(message)
        self.was_killed = was_killed
        self.may_have_run = may_have_run


class DeadlineExceededError(PagodaError):
    """The request's own deadline passed before it was finished."""

    kind = ErrorKind.DEADLINE_EXCEEDED


class RequestFailedError(PagodaError):
    """An internal error ended this request; others were not affected."""

    kind = ErrorKind.INTERNAL


class ConfigError(PagodaError):
    """A configuration that cannot work. The message names key, value, source and what is allowed."""

    kind = ErrorKind.INVALID_REQUEST


class CheckpointError(PagodaError):
    """A checkpoint that cannot be loaded: a missing, misshapen or unknown tensor, or an unsupported architecture."""

    kind = ErrorKind.INVALID_REQUEST


class CommunicationError(PagodaError):
    """The ranks of a model cannot reach each other. The message names the ranks and what they were doing."""


ERROR_TYPES: dict[ErrorKind, type[PagodaError]] = {
    # Its message is whole already.
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: InvalidRequestError,
} | {
    cls.kind: cls
    for cls in (
        InvalidRequestError,
        AuthenticationError,
        PermissionDeniedError,
        ModelNotFoundError,
        RequestTooLargeError,
        NotSupportedError,
        QueueFullError,
        RateLimitError,
        EngineNotReadyError,
        EngineDeadError,
        DeadlineExceededError,
        RequestFailedError,
    )
}


def error_of(kind: ErrorKind, message: str) -> PagodaError:
    """The exception for a `kind` that came from another process."""
    error = ERROR_TYPES[kind](message)
    error.kind = kind
    return error
