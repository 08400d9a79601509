"""From texts to vectors and scores over the engine client; what `TextGenerator` is for models that generate."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn, cast

from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineNotReadyError, ErrorKind, NotSupportedError, RequestFailedError, error_of
from pagoda.models.pooling_config import read_model, read_pooler
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest, GenerationRequest, PoolingRequest, TokenIds
from pagoda.sampling.output import FinishReason
from pagoda.text.generation import UNFINISHED
from pagoda.text.output import GenerationChunk
from pagoda.text.pooling_prompts import PoolingPrompts
from pagoda.text.validation import RequestLimits, check_pooled_prompt, pooling_request

if TYPE_CHECKING:
    from pagoda.engine.client.interface import EngineClient
    from pagoda.engine.client.request_queue import QueuePlaces
    from pagoda.text.pool import TokenizerPool


class TextPooler:
    """Tokenizes, truncates, validates and submits; one for each served model that pools.

    `tasks`, `size`, `labels` and `dimensions` are those of `PoolerConfig`; `prompts` what is put before texts; `directory`
    where the model's files are.
    """

    def __init__(self, client: EngineClient, pool: TokenizerPool, config: PagodaConfig) -> None:
        """`pool` has been started. Raises `CheckpointError` when the checkpoint's configuration cannot be read."""
        assert config.model is not None
        pooler = read_pooler(config, config.model, read_model(config.model, model_impl=config.model_impl))
        assert pooler is not None, "the model generates"
        self.client = client
        self.pool = pool
        self.directory = config.model
        self.tasks = pooler.tasks
        self.size = pooler.size
        self.labels = pooler.labels
        self.dimensions = pooler.dimensions
        self.scores_tokens = bool(pooler.score_tokens)
        self.prompts = PoolingPrompts.of(config.model, config.rerank_template)
        if client.ready is not None:
            pool.max_model_len = client.ready.max_model_len

    async def shutdown(self) -> None:
        """Nothing to end."""

    @property
    def task(self) -> str:
        """What the model is served for."""
        return self.tasks[0]

    def sampling_params(self, given: Mapping[str, Any]) -> NoReturn:
        """Raises `NotSupportedError`: nothing is sampled."""
        del given
        raise NotSupportedError(f"this model does not generate; it is served for {', '.join(self.tasks)}", "model")

    def check(self, params: PoolingParams) -> PoolingParams:
        """`params`, if the model can do it. Raises `InvalidRequestError`."""
        return params.checked(self.tasks, self.size, self.dimensions)

    async def generate(
        self, request: PoolingRequest | GenerationRequest, places: QueuePlaces | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The one chunk of a request, with its `pooled` output. Raises what `TextGenerator.generate` does."""
        if isinstance(request, GenerationRequest):
            self.sampling_params({})
        limits = self._limits()
        params = self.check(request.params)
        prompt, second_segment = request.prompt, params.second_segment
        if isinstance(prompt, str):
            token_ids, second_segment = await self.pool.encode_whole(
                prompt,
                request.pair,
                add_special_tokens=request.add_special_tokens,
                truncate_to=request.truncate_prompt_tokens,
            )
        else:
            token_ids = prompt.tolist() if isinstance(prompt, TokenIds) else list(prompt)
            if request.truncate_prompt_tokens is not None:
                longest = limits.max_model_len
                token_ids = token_ids[
                    : longest if request.truncate_prompt_tokens < 0 else request.truncate_prompt_tokens
                ]
        check_pooled_prompt(token_ids, limits)
        spec = pooling_request(request, token_ids, params._replace(second_segment=second_segment))
        outputs = aclosing(cast("AsyncGenerator[EngineOutput, None]", self.client.submit(spec, places)))
        async with outputs as stream:
            async for output in stream:
                yield pooled_chunk(spec, output)
                return
        raise RequestFailedError(UNFINISHED)

    def _limits(self) -> RequestLimits:
        ready = self.client.ready
        if ready is None:
            raise EngineNotReadyError("the model is still loading")
        self.pool.max_model_len = ready.max_model_len
        return RequestLimits(max_model_len=ready.max_model_len, vocab_size=ready.vocab_size)


def pooled_chunk(spec: EngineRequest, output: EngineOutput) -> GenerationChunk:
    """The chunk that a request's only output becomes. Raises the error that it ended with."""
    if output.finish_reason is FinishReason.ERROR:
        raise error_of(output.error_kind or ErrorKind.INTERNAL, output.error or "the engine gave no reason")
    if output.pooled is None and output.finish_reason is not FinishReason.ABORT:
        raise RequestFailedError(f"the request ended with {output.finish_reason} before it was computed")
    return GenerationChunk(
        pooled=output.pooled,
        finish_reason=output.finish_reason,
        num_prompt_tokens=spec.num_prompt_tokens,
        prompt_token_ids=spec.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        scheduled_time=output.scheduled_time,
    )
