"""JSON responses, and the report of an error, counted and logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import orjson
from starlette.responses import Response

from pagoda.errors import ErrorKind
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.status import ErrorReport, report

logger = logging.getLogger(__name__)

JSON = "application/json"


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` (plain values and dataclasses of them) as JSON."""
    return Response(orjson.dumps(content), status, headers, JSON)


def error_body(message: str) -> bytes:
    """The JSON of an error that no protocol's route has seen."""
    return orjson.dumps({"error": message})


def report_error(error: Exception, metrics: Metrics, path: str) -> ErrorReport:
    """The report of `error` for the client; counts it, and logs internal errors."""
    error_report = report(error)
    metrics.count_error(error_report.kind)
    if error_report.kind is ErrorKind.INTERNAL:
        logger.error("internal error on %s", path, exc_info=error)
    return error_report
