"""Errors in OpenAI's shape."""

from __future__ import annotations

from functools import partial
from typing import Any

from pagoda.serving.http.documentation import error_responses
from pagoda.serving.openai.types import OpenAIErrorResponse
from pagoda.serving.status import ErrorReport

PATH_PREFIXES = (
    *("/v1/", "/openai/", "/tokenize", "/detokenize", "/invocations"),
    *("/score", "/rerank", "/v2/rerank", "/classify", "/pooling"),
)

openai_errors = partial(error_responses, OpenAIErrorResponse)
"""`responses` of a route for these error statuses."""


def is_openai_path(path: str) -> bool:
    """Whether errors on `path` have OpenAI's shape."""
    return path.startswith(PATH_PREFIXES) or path in ("/v1", "/openai")


def openai_error(report: ErrorReport) -> dict[str, Any]:
    """The body of an error."""
    return {
        "error": {
            "message": report.message,
            "type": report.openai_type,
            "param": report.param,
            "code": str(report.kind),
        }
    }
