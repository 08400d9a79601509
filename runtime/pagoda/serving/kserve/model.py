"""Pagoda as KServe sees it: a `Model` whose `predict` generates, and a `DataPlane` whose answers about health are true.

The stock data plane says live and ready whatever the engine does, and loads a model that is asked for while it is not ready.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from kserve import InferRequest, InferResponse, Model, ModelRepository
from kserve.model import BaseKServeModel
from kserve.protocol.dataplane import DataPlane

import pagoda
from pagoda.errors import InvalidRequestError, ModelNotFoundError
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import limit_time
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header
from pagoda.serving.v2.inference import (
    EXTENSIONS,
    INPUTS,
    MODEL_VERSION,
    OUTPUTS,
    PLATFORM,
    from_infer_request,
    output_tensors,
    parse_infer,
)
from pagoda.serving.v2.json_codec import infer_outputs
from pagoda.serving.v2.tensors import shown


class PagodaModel(Model):  # type: ignore[misc]  # kserve is not typed
    """The served model. Registered before it is ready: KServe takes in only models that say they are."""

    def __init__(self, context: ServingContext, start_engine: Callable[[], Awaitable[None]]) -> None:
        super().__init__(context.model_name)
        self.context = context
        self.engine = True
        self.ready = True
        self._start_engine = start_engine

    def start(self) -> None:
        """Nothing to do: the engine starts in `start_engine`."""

    async def start_engine(self) -> None:
        """Load the model; returns when it is ready."""
        await self._start_engine()

    def load(self) -> bool:
        """Whether the model is loaded; it is never loaded on demand."""
        return self.context.health.is_ready

    async def healthy(self) -> bool:
        """Whether a request sent now would be taken."""
        return self.context.health.is_ready

    def stop(self) -> None:
        """Nothing to do: the server ends the engine once running requests are done."""

    def stop_engine(self) -> None:
        """Nothing to do, as in `stop`."""

    def get_input_types(self) -> list[dict[str, Any]]:
        """The inputs in V2 metadata."""
        return [dict(entry) for entry in INPUTS]

    def get_output_types(self) -> list[dict[str, Any]]:
        """The outputs in V2 metadata."""
        return [dict(entry) for entry in OUTPUTS]

    async def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:
        """Generate for every prompt of `payload`; cancelling the call aborts them in the engine."""
        runner = self.context.runner
        batch = parse_infer(from_infer_request(payload), runner.generator.sampling_params)
        seconds = parse_timeout_header((headers or {}).get(TIMEOUT_HEADER))
        jobs = [limit_time(job, seconds) for job in batch.jobs]
        if batch.stream:
            raise InvalidRequestError(
                "infer does not stream; use generate_stream, or gRPC's ModelStreamInfer", "stream"
            )
        results = await runner.collect_all(jobs, f"infer-{uuid.uuid4().hex}")
        return InferResponse(
            response_id=payload.id or uuid.uuid4().hex,
            model_name=self.name,
            model_version=MODEL_VERSION,
            infer_outputs=infer_outputs(output_tensors(results, batch.output_names)),
            requested_outputs=payload.request_outputs,
        )


class EngineDataPlane(DataPlane):  # type: ignore[misc]  # kserve is not typed
    """KServe's data plane over the one health of the server."""

    def __init__(self, model_registry: ModelRepository, context: ServingContext) -> None:
        super().__init__(model_registry=model_registry)
        self._context = context

    async def live(self) -> dict[str, str]:
        """KServe's spelling of liveness."""
        return {"status": "alive" if self._context.health.is_live else "dead"}

    async def ready(self) -> bool:
        """Whether every model would take a request."""
        return self._context.health.is_ready

    def metadata(self) -> dict[str, Any]:
        """V2 server metadata."""
        return {"name": PLATFORM, "version": pagoda.__version__, "extensions": list(EXTENSIONS)}

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """V2 model metadata."""
        model = self.get_model_from_registry(model_name)
        return {
            "name": model_name,
            "versions": [MODEL_VERSION],
            "platform": PLATFORM,
            "inputs": model.get_input_types(),
            "outputs": model.get_output_types(),
        }

    def get_model_from_registry(self, name: str) -> Model:
        """The model of that name, ready or not; `ModelNotFoundError` if there is none."""
        model = self.model_registry.get_model(name)
        if model is None:
            raise ModelNotFoundError(f"there is no model {shown(name)} here; the model is {self._context.model_name!r}")
        return model

    async def get_model(self, name: str) -> BaseKServeModel:
        """The model of that name, if it would take a request; else the error that says why not."""
        model = self.get_model_from_registry(name)
        self._context.health.check_ready()
        return model

    def check_version(self, version: str | None) -> None:
        """`ModelNotFoundError` for any version but the one there is."""
        if version not in (None, "", MODEL_VERSION):
            raise ModelNotFoundError(f"there is no version {shown(version)}; the only one is {MODEL_VERSION!r}")
