"""The status of each kind of error in HTTP, gRPC and OpenAI's error types: the one table."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.errors import ErrorKind, InvalidRequestError, NotSupportedError, PagodaError, QueueFullError, RateLimitError

RETRY_AFTER_NOT_READY_SECONDS = 5
MAX_MESSAGE_CHARACTERS = 1000
MAX_PARAM_CHARACTERS = 100
"""Of a sentence for the client, and of a field's name, which the client may have chosen."""


@dataclass(frozen=True, slots=True)
class ProtocolStatus:
    """The status of one error kind in three protocols.

    `grpc_code` is the name of a `grpc.StatusCode` member, so that nothing here imports grpc.
    """

    http_status: int
    grpc_code: str
    openai_type: str


STATUS_BY_KIND: dict[ErrorKind, ProtocolStatus] = {
    ErrorKind.INVALID_REQUEST: ProtocolStatus(400, "INVALID_ARGUMENT", "invalid_request_error"),
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: ProtocolStatus(400, "INVALID_ARGUMENT", "invalid_request_error"),
    ErrorKind.UNAUTHENTICATED: ProtocolStatus(401, "UNAUTHENTICATED", "authentication_error"),
    ErrorKind.PERMISSION_DENIED: ProtocolStatus(403, "PERMISSION_DENIED", "permission_error"),
    ErrorKind.NOT_FOUND: ProtocolStatus(404, "NOT_FOUND", "not_found_error"),
    ErrorKind.TOO_LARGE: ProtocolStatus(413, "RESOURCE_EXHAUSTED", "invalid_request_error"),
    ErrorKind.QUEUE_FULL: ProtocolStatus(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    ErrorKind.RATE_LIMITED: ProtocolStatus(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    # Not 501, which OpenAI's SDKs send again: it would fail three times.
    ErrorKind.NOT_SUPPORTED: ProtocolStatus(400, "UNIMPLEMENTED", "invalid_request_error"),
    ErrorKind.NOT_READY: ProtocolStatus(503, "UNAVAILABLE", "service_unavailable_error"),
    ErrorKind.ENGINE_DEAD: ProtocolStatus(503, "UNAVAILABLE", "service_unavailable_error"),
    ErrorKind.DEADLINE_EXCEEDED: ProtocolStatus(504, "DEADLINE_EXCEEDED", "timeout_error"),
    ErrorKind.INTERNAL: ProtocolStatus(500, "INTERNAL", "internal_error"),
}


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """What a client may know about an error. `retry_after_seconds` is set where sending it again can help."""

    kind: ErrorKind
    message: str
    http_status: int
    grpc_code: str
    openai_type: str
    param: str | None = None
    retry_after_seconds: int | None = None


def report(error: BaseException) -> ErrorReport:
    """The report of any exception; one that Pagoda did not raise on purpose becomes INTERNAL and keeps its text back."""
    kind = error.kind if isinstance(error, PagodaError) else ErrorKind.INTERNAL
    message = (
        str(error) if isinstance(error, PagodaError) else "an internal error ended this request; see the server log"
    )
    status = STATUS_BY_KIND[kind]
    param = error.param if isinstance(error, InvalidRequestError | NotSupportedError) else None
    retry_after: int | None = None
    if isinstance(error, QueueFullError | RateLimitError):
        retry_after = error.retry_after_seconds
    elif kind in (ErrorKind.NOT_READY, ErrorKind.ENGINE_DEAD):
        retry_after = RETRY_AFTER_NOT_READY_SECONDS
    return ErrorReport(
        kind=kind,
        message=_clipped(message, MAX_MESSAGE_CHARACTERS),
        http_status=status.http_status,
        grpc_code=status.grpc_code,
        openai_type=error.limit if isinstance(error, RateLimitError) else status.openai_type,
        param=None if param is None else _clipped(param, MAX_PARAM_CHARACTERS),
        retry_after_seconds=retry_after,
    )


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
