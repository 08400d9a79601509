"""The OpenAPI page: routes read their bodies raw, so what they take and give is declared here and not by signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pagoda.serving.auth.routes import ROUTES
from pagoda.serving.auth.scopes import Access

_CONVERTOR = re.compile(r":\w+}")  # of a parameter in a route's path
REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is invalid.",
    401: "An API key is missing or not known.",
    403: "The API key does not have the scope that this route needs.",
    404: "No such model or version.",
    413: "The body is larger than max_body_bytes.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "An internal error ended this request.",
    503: "The model is loading, the server is shutting down, or the engine is dead.",
    504: "The request's deadline passed.",
}


JSON_OBJECT = {"application/json": {"schema": {"type": "object"}}}
"""Content of answers that have no model."""


def object_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for these error statuses, whose bodies have no model."""
    return {status: {"description": ERRORS[status], "content": JSON_OBJECT} for status in statuses}


def request_body(*models: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """`openapi_extra` of a route whose body is one of `models`, which must be among those given to `install`."""
    schemas = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def error_responses(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for these error statuses, whose bodies are of `model`. A route with 401 has 403, too."""
    if 401 in statuses:
        statuses = (*statuses, 403)
    return {status: {"description": ERRORS[status], "model": model} for status in statuses}


def event_stream(description: str) -> dict[str, Any]:
    """The content of a 200 response that is a stream of events."""
    return {"description": description, "content": {"text/event-stream": {"schema": {"type": "string"}}}}


def install(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Make `app.openapi()` describe the routes as they are; `bodies` are the models of all request bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            # FastAPI adds its own validation error wherever a path has parameters; bad input is a 400 here.
            operation["responses"].pop("422", None)
    _describe_keys(document)
    _, definitions = models_json_schema([(model, "validation") for model in bodies], ref_template=REFERENCE)
    schemas.update(definitions.get("$defs", {}))
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _describe_keys(document: dict[str, Any]) -> None:
    """Which operations need an API key, where the server has keys, and how it is sent."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, on a server that has keys."},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
    }
    access = {_CONVERTOR.sub("}", route): access for route, access in ROUTES.items()}
    document["security"] = [{"bearer": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if access.get(f"{method.upper()} {path}") is Access.PUBLIC:
                operation["security"] = []
