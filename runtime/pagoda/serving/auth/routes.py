"""What every REST route and every RPC asks of its caller. What is not declared here is not served: the server does not start.

Probes, which have no key to send, are public and answer without details, and so is the description of the API. Whoever has any
key may ask for what the server is; everything else needs a scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from starlette.routing import compile_path

from pagoda.serving.auth.scopes import Access
from pagoda.serving.model_paths import MODEL_NAME, V2_MODEL, V2_VERSION

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

OPENAI = ("/v1", "/openai/v1")
MODEL = (V2_MODEL, V2_VERSION)

ROUTES: Mapping[str, Access] = {
    # Probes; /health adds details for who may read them.
    **dict.fromkeys(("GET /", "GET /health", "GET /v2/health/live", "GET /v2/health/ready"), Access.PUBLIC),
    **{f"GET {model}/ready": Access.PUBLIC for model in MODEL},
    # The description of the API, the same on every server of this version.
    **dict.fromkeys(("GET /docs", "GET /openapi.json"), Access.PUBLIC),
    **{f"GET /docs/{name}": Access.PUBLIC for name in ("swagger-ui.css", "swagger-ui-bundle.js", "initialize.js")},
    # The page, and what it shows of the engines.
    **dict.fromkeys(("GET /ui", "GET /ui/{asset}"), Access.PUBLIC),
    "GET /ui/events": Access.READ,
    "GET /ui/keys": Access.ADMIN,
    **dict.fromkeys(("GET /version", "GET /v2", "GET /v2/"), Access.ANY_KEY),
    **dict.fromkeys(
        ("GET /metrics", "GET /load", "GET /server_info", "GET /is_sleeping", "GET /settings"), Access.READ
    ),
    **dict.fromkeys(("GET /ping", "POST /ping"), Access.PUBLIC),
    # The model, and what it does.
    **{f"GET {model}/config": Access.INFER for model in MODEL},
    **{f"GET {path}/stats": Access.READ for path in ("/v2/models", *MODEL)},
    **{f"GET {model}": Access.INFER for model in MODEL},
    **{
        f"POST {model}/{operation}": Access.INFER
        for model in MODEL
        for operation in ("infer", "generate", "generate_stream")
    },
    **{f"GET {prefix}/models{end}": Access.INFER for prefix in OPENAI for end in ("", "/", f"/{MODEL_NAME}")},
    **{
        f"POST {prefix}/{operation}": Access.INFER
        for prefix in OPENAI
        for operation in (
            *("completions", "completions/render", "chat/completions", "chat/completions/render"),
            *("responses", "embeddings", "decisions"),
        )
    },
    **{
        f"{method} {prefix}/responses/{{response_id}}": Access.INFER
        for prefix in OPENAI
        for method in ("GET", "DELETE")
    },
    **dict.fromkeys(("POST /v1/messages", "POST /v1/messages/count_tokens"), Access.INFER),
    **dict.fromkeys(("POST /tokenize", "POST /detokenize", "POST /invocations", "GET /tokenizer_info"), Access.INFER),
    **dict.fromkeys(("POST /", "POST /generate", "POST /generate_stream", "GET /info"), Access.INFER),
    **dict.fromkeys(("POST /api/generate", "POST /api/chat", "POST /api/show"), Access.INFER),
    **dict.fromkeys(("GET /api/tags", "GET /api/ps"), Access.INFER),
    "GET /api/version": Access.ANY_KEY,
    **{
        f"POST {prefix}/{operation}": Access.INFER
        for prefix in ("", "/v1")
        for operation in ("score", "rerank", "classify", "pooling")
    },
    "POST /v2/rerank": Access.INFER,
    "POST /v2/repository/index": Access.INFER,
    # What changes for everybody.
    **dict.fromkeys(("POST /reset_prefix_cache", "POST /sleep", "POST /wake_up", "PATCH /settings"), Access.ADMIN),
    **{f"POST /v1/{action}_lora_adapter": Access.ADMIN for action in ("load", "unload")},
    **{f"POST /v2/repository/models/{MODEL_NAME}/{action}": Access.ADMIN for action in ("load", "unload")},
}

METHODS: Mapping[str, Access] = {
    **{
        f"/inference.GRPCInferenceService/{method}": access
        for access, methods in {
            Access.PUBLIC: ("ServerLive", "ServerReady", "ModelReady"),
            Access.ANY_KEY: ("ServerMetadata",),
            Access.READ: ("ModelStatistics",),
            Access.INFER: ("ModelMetadata", "ModelConfig", "RepositoryIndex", "ModelInfer", "ModelStreamInfer"),
            Access.ADMIN: ("RepositoryModelLoad", "RepositoryModelUnload"),
        }.items()
        for method in methods
    },
    # Probes, and the description of the API.
    **dict.fromkeys(("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"), Access.PUBLIC),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.PUBLIC,
}


def check_declared(kind: str, served: Iterable[str], declared: Mapping[str, Access]) -> None:
    """Raise `LookupError` for what is served and not declared: whoever adds a route says who may call it."""
    missing = sorted(set(served) - declared.keys())
    if missing:
        raise LookupError(f"{kind} without a declared access, in pagoda.serving.auth.routes: {', '.join(missing)}")


class RouteAccess:
    """The access of a request by its method and path, matched as the router matches it.

    A path that is no route, and a method that a route does not have, need any key: which paths exist is not shown without one.
    """

    def __init__(self, routes: Iterable[BaseRoute], declared: Mapping[str, Access] = ROUTES) -> None:
        """Raises `LookupError` for a route without a declared access."""
        by_path: dict[str, dict[str, Access]] = {}
        served = []
        for route in routes:
            path, methods = getattr(route, "path", ""), getattr(route, "methods", None)
            if not path or not methods:
                raise LookupError(f"{route!r} is no route with a path and methods, which alone can be declared")
            for method in methods:
                name = f"{'GET' if method == 'HEAD' else method} {path}"
                served.append(name)
                by_path.setdefault(path, {})[method] = declared.get(name, Access.ANY_KEY)
        check_declared("routes", served, declared)
        self._exact = {path: methods for path, methods in by_path.items() if "{" not in path}
        self._patterns = [(compile_path(path)[0], methods) for path, methods in by_path.items() if "{" in path]

    def of(self, method: str, path: str) -> Access:
        """What a request must bring."""
        exact = self._exact.get(path)
        if exact is not None:
            return exact.get(method, Access.ANY_KEY)
        for pattern, methods in self._patterns:
            if method in methods and pattern.match(path):
                return methods[method]
        return Access.ANY_KEY
