"""A checked request to a model, before and while it runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from pagoda.errors import InvalidRequestError
from pagoda.serving.models import ServedModel
from pagoda.serving.v2.inference import V2Batch, V2Request, V2Response, output_tensors
from pagoda.text.output import CompletionOutput, GenerationChunk


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
            model_version=self.model.version,
            request_id=self.request.request_id,
            outputs=output_tensors(results, self.batch.output_names),
        )

    def stream(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """`(prompt index, chunk)` as they come; closing the iterator aborts all prompts in the engine."""
        return self.model.runner.stream_all(self.batch.jobs, self.engine_request_id)
