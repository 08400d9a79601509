"""The Open Inference Protocol (V2), whatever carries it: one set of responses, one wording of every error.

REST v2 routes   bytes ─▶ json_codec ───┐                          ┌──▶ json_codec ─▶ bytes
REST generate    JSON  ─▶ generate ─────┼─▶ V2Request ─▶ V2Service ┼──▶ generate ───▶ JSON, events
gRPC service     proto ─▶ grpc.codec ───┘      V2Call, V2Response  └──▶ grpc.codec ─▶ proto
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pagoda
from pagoda.engine.health import EngineState
from pagoda.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError, shown
from pagoda.serving.health import ServerHealth
from pagoda.serving.models import ServedModel, ServedModels
from pagoda.serving.v2.inference import (
    INPUTS,
    OUTPUTS,
    V2Batch,
    V2Request,
    V2Response,
    output_tensors,
    parse_infer,
)
from pagoda.text.output import CompletionOutput, GenerationChunk

MODEL_VERSION = "1"
PLATFORM = "pagoda"
EXTENSIONS = (
    "model_repository",
    "model_repository_extension",  # KServe's name of the same
    "binary_tensor_data",
    "parameters",
)
"""What every transport has; each adds its own."""


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """What the server is."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What the model takes and gives."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model in the repository index. `state` is Triton's READY, LOADING or UNAVAILABLE; `reason` is empty for READY."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class V2Call:
    """A checked request to a model that is ready. Nothing runs before one of its methods is called, once."""

    model: ServedModel
    request: V2Request
    batch: V2Batch
    engine_request_id: str

    async def results(self) -> list[list[CompletionOutput]]:
        """The finished sequences, `[prompt][sequence]`; cancelling the call aborts them in the engine."""
        if self.batch.stream:
            raise InvalidRequestError(
                "stream is for generate_stream (REST) and ModelStreamInfer (gRPC); other methods give one response",
                "stream",
            )
        return await self.model.runner.collect_all(self.batch.jobs, self.engine_request_id)

    async def infer(self) -> V2Response:
        """The outputs of all prompts together; cancelling the call aborts them in the engine."""
        results = await self.results()
        return V2Response(
            model_name=self.model.name,
            model_version=MODEL_VERSION,
            request_id=self.request.request_id,
            outputs=output_tensors(results, self.batch.output_names),
        )

    def stream(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """`(prompt index, chunk)` as they come; closing the iterator aborts all prompts in the engine."""
        return self.model.runner.stream_all(self.batch.jobs, self.engine_request_id)


class V2Service:
    """What the V2 protocol asks of this server. All methods raise `PagodaError`s whose sentence is for the client."""

    def __init__(self, models: ServedModels, health: ServerHealth) -> None:
        self._models = models
        self._health = health

    # ---- the server -----------------------------------------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        """Whether the process can still become ready."""
        return self._health.is_live

    @property
    def is_ready(self) -> bool:
        """Whether requests sent now would be accepted."""
        return self._health.is_ready

    def metadata(self, *extensions: str) -> ServerMetadata:
        """Name, version and extensions of the server; `extensions` are those of the transport."""
        return ServerMetadata(PLATFORM, pagoda.__version__, (*EXTENSIONS, *extensions))

    # ---- models ---------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """The model, ready or not; raises `ModelNotFoundError` for another name or version."""
        model = self._models.find(name)
        if version not in (None, "", MODEL_VERSION):
            raise ModelNotFoundError(
                f"model {name!r} has no version {shown(version)}; its only version is {MODEL_VERSION!r}"
            )
        return model

    def find_ready(self, name: str, version: str | None = None) -> ServedModel:
        """The model, if a request to it would be accepted now; else raises why not."""
        model = self.find(name, version)
        model.health.check_ready()
        return model

    def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Inputs and outputs of the model, loaded or not."""
        return ModelMetadata(self.find(name, version).name, (MODEL_VERSION,), PLATFORM, INPUTS, OUTPUTS)

    def index(self, *, only_ready: bool = False) -> list[ModelState]:
        """Every model of the repository with its state."""
        states = [_state_of(model) for model in self._models]
        return [state for state in states if state.state == "READY" or not only_ready]

    def load(self, name: str) -> ServedModel:
        """The model, if it is loaded: it is loaded at start and never on demand."""
        return self.find_ready(name)

    def unload(self, name: str) -> None:
        """Always raises: `NotSupportedError` for a model that is served."""
        model = self.find(name)
        raise NotSupportedError(
            f"model {model.name!r} cannot be unloaded while the server runs; stop the server instead"
        )

    # ---- inference ------------------------------------------------------------------------------------------------

    def prepare(self, request: V2Request) -> V2Call:
        """Check everything that can be checked before a prompt is tokenized."""
        model = self.find_ready(request.model_name, request.model_version)
        batch = parse_infer(request, model.runner.generator.sampling_params)
        return V2Call(model, request, batch, f"{request.method}-{uuid.uuid4().hex}")


def _state_of(model: ServedModel) -> ModelState:
    health = model.health
    if health.is_ready:
        return ModelState(model.name, MODEL_VERSION, "READY", "")
    state = "LOADING" if health.state is EngineState.STARTING else "UNAVAILABLE"
    return ModelState(model.name, MODEL_VERSION, state, health.cause or health.phase)
