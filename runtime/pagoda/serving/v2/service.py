"""The Open Inference Protocol (V2), whatever carries it: one set of responses, one wording of every error.

REST v2 routes   bytes ─▶ json_codec ───┐                          ┌──▶ json_codec ─▶ bytes
REST generate    JSON  ─▶ generate ─────┼─▶ V2Request ─▶ V2Service ┼──▶ generate ───▶ JSON, events
gRPC service     proto ─▶ grpc.codec ───┘      V2Call, V2Response  └──▶ grpc.codec ─▶ proto
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

import pagoda
from pagoda.engine.health import EngineState
from pagoda.errors import EngineNotReadyError, InvalidRequestError, ModelNotFoundError, NotSupportedError, shown
from pagoda.serving.health import Health
from pagoda.serving.models import ModelRegistry, ServedModel
from pagoda.serving.repository import ModelRepository
from pagoda.serving.v2.call import V2Call
from pagoda.serving.v2.inference import INPUTS, OUTPUTS, V2Request, parse_infer
from pagoda.serving.v2.pooled import POOLED_INPUTS, PooledCall, outputs_of, parse_pooled
from pagoda.serving.versions import LOADING, Strategy, check_strategy, check_version
from pagoda.text.pooling import TextPooler

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


class V2Service:
    """What the V2 protocol asks of this server. All methods raise `PagodaError`s whose sentence is for the client."""

    def __init__(self, models: ModelRegistry, health: Health, repository: ModelRepository) -> None:
        self._models = models
        self._health = health
        self._repository = repository

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
        if version not in (None, "", model.version):
            for other in self._repository.other_versions(model):
                if other.version == version:
                    raise EngineNotReadyError(
                        f"version {shown(version)} of model {name!r} takes no requests: {other.state}"
                        f"{other.cause and f' ({other.cause})'}; version {model.version!r} serves"
                    )
            raise ModelNotFoundError(
                f"model {name!r} has no version {shown(version)}; its only version is {model.version!r}"
            )
        return model

    def find_ready(self, name: str, version: str | None = None) -> ServedModel:
        """The model, if a request to it would be accepted now; else raises why not."""
        model = self.find(name, version)
        model.health.check_ready()
        return model

    async def wait_ready(self, name: str, version: str | None = None, seconds: float | None = None) -> ServedModel:
        """The model that a request is for, once it takes requests, see `ModelRepository.ready`."""
        return await self._repository.ready(self.find(name, version), seconds)

    def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Inputs and outputs of the model, loaded or not."""
        model = self.find(name, version)
        text = model.runner.generator if model.runner.has_generator else None
        inputs, outputs = (POOLED_INPUTS, outputs_of(text)) if isinstance(text, TextPooler) else (INPUTS, OUTPUTS)
        return ModelMetadata(model.name, (model.version,), PLATFORM, inputs, outputs)

    def index(self, *, only_ready: bool = False) -> list[ModelState]:
        """Every version of every model of the repository with its state."""
        states = []
        for model in self._models:
            states.append(_state_of(model))
            for other in self._repository.other_versions(model):
                state = "LOADING" if other.state == LOADING else "UNAVAILABLE"
                states.append(ModelState(model.name, other.version, state, other.cause or other.state))
        return [state for state in states if state.state == "READY" or not only_ready]

    async def load(self, name: str, parameters: Mapping[str, object] | None = None) -> ServedModel:
        """The model, once it is loaded. `parameters`: Triton's `config`, a JSON object of settings for as long as it is, the
        `version` that this is, and the `strategy` by which it takes the place of another.

        Raises what `ModelRepository.load` does.
        """
        model = await self._repository.find(name)
        given = dict(parameters or {})
        version, strategy = given.pop("version", None), given.pop("strategy", Strategy.ROLLING_UPDATE)
        return await self._repository.load(
            model,
            _settings_of(given),
            version=None if version is None else check_version(str(version)),
            strategy=check_strategy(strategy),
        )

    async def unload(self, name: str, parameters: Mapping[str, object] | None = None) -> ServedModel:
        """The model, once it is unloaded. Raises what `ModelRepository.unload` does."""
        model = self.find(name)
        for key in parameters or {}:
            if key != "unload_dependents":  # there are none
                raise InvalidRequestError(f"unknown parameter {shown(key)}; unload_dependents is allowed", "parameters")
        await self._repository.unload(model)
        return model

    # ---- inference ------------------------------------------------------------------------------------------------

    def prepare(self, request: V2Request) -> V2Call:
        """Check everything that can be checked before a prompt is tokenized."""
        model = self.find_ready(request.model_name, request.model_version)
        engine_request_id = f"{request.method}-{uuid.uuid4().hex}"
        text = model.runner.generator
        if isinstance(text, TextPooler):
            return PooledCall(model, request, parse_pooled(request, text), engine_request_id, text)
        return V2Call(model, request, parse_infer(request, text.sampling_params), engine_request_id)


def _settings_of(parameters: Mapping[str, object]) -> Mapping[str, Any]:
    """The settings in the parameters of a load."""
    for key, value in parameters.items():
        if key.startswith("file:"):
            raise NotSupportedError("files of a model cannot be sent; put them into its directory")
        if key != "config":
            raise InvalidRequestError(
                f"unknown parameter {shown(key)}; config, version and strategy are allowed", "parameters"
            )
        if isinstance(value, str | bytes):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise InvalidRequestError(f"config is not JSON: {error}", "parameters") from None
        if not isinstance(value, dict):
            raise InvalidRequestError("config must be a JSON object of settings", "parameters")
        return value
    return {}


def _state_of(model: ServedModel) -> ModelState:
    health = model.health
    if health.is_ready:
        return ModelState(model.name, model.version, "READY", "")
    state = "LOADING" if health.state is EngineState.STARTING else "UNAVAILABLE"
    return ModelState(model.name, model.version, state, health.cause or health.phase)
