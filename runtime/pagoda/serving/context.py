"""What all protocols share in one server process; built once by `serving.build`."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.config.schema import PagodaConfig
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.health import Health
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.models import ModelRegistry
from pagoda.serving.rate_limits import RateLimiter
from pagoda.serving.repository import ModelRepository
from pagoda.serving.request_turns import RequestTurns
from pagoda.serving.tracing.seam import Tracing


@dataclass(slots=True, kw_only=True)
class ServingContext:
    """The parts that a route or a gRPC method needs; all exist from the first second, before a model is loaded.

    `models`: those that are served, each with what its requests need; `repository`: which of them are loaded; `health`: of
    the server. `rate_limits`: what of requests and tokens a minute each tenant has left, of all models together.
    `config` is replaced where settings change while the server runs (`serving.settings`).
    """

    config: PagodaConfig
    models: ModelRegistry
    repository: ModelRepository
    health: Health
    metrics: Metrics
    keys: ApiKeys
    decoding: DecodingThreads
    turns: RequestTurns
    rate_limits: RateLimiter
    tracing: Tracing
