"""What all protocols share in one server process; built once by `serving.build`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagoda.config.schema import PagodaConfig
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.generation import MAX_SEQUENCES_PER_REQUEST, GenerationRunner
from pagoda.serving.health import ServerHealth
from pagoda.serving.json_decoding import NO_LIMITS, JsonLimits
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.models import ServedModels

if TYPE_CHECKING:
    from pagoda.engine.client.client import EngineClient
    from pagoda.text.generation import TextGenerator


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingContext:
    """The parts that a route or a gRPC method needs; all exist from the first second, before the model is loaded."""

    config: PagodaConfig
    client: EngineClient
    models: ServedModels
    runner: GenerationRunner
    health: ServerHealth
    metrics: Metrics
    keys: ApiKeys
    decoding: DecodingThreads

    @property
    def generator(self) -> TextGenerator:
        """The text layer; raises `EngineNotReadyError` while the model loads."""
        return self.runner.generator

    @property
    def json_limits(self) -> JsonLimits:
        """What a body may hold: prompts that fit the model's context, as many as a request may have."""
        ready = self.client.ready
        if ready is None or not self.health.is_ready:
            return NO_LIMITS
        return JsonLimits(self.generator.pool.max_characters, MAX_SEQUENCES_PER_REQUEST * ready.max_model_len)

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""
        return self.config.served_model_name
