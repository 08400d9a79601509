"""From a prompt to a stream of text over the engine client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineNotReadyError, InvalidRequestError, RequestFailedError
from pagoda.request import EngineRequest, GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.text.checkpoint_defaults import read_checkpoint_defaults
from pagoda.text.output import GenerationChunk, PositionLogprobs, TokenLogprob
from pagoda.text.output_processor import RequestTextState
from pagoda.text.validation import RequestLimits, validate_request

if TYPE_CHECKING:
    from pagoda.engine.client.client import EngineClient
    from pagoda.text.pool import TokenizerPool

__all__ = ["GenerationChunk", "PositionLogprobs", "TextGenerator", "TokenLogprob"]

UNFINISHED = "the engine left a request without finishing it"
_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


class TextGenerator:
    """Tokenizes, validates, fans out, detokenizes and cuts at stop strings; one for each served model.

    `pool` and `client` are public: `await generator.pool.encode(text)`, `.decode(ids)`,
    `.render_chat_and_encode(messages, ...)` serve the routes that need tokens and no generation.
    `default_max_tokens` is used when `max_tokens` was not given; `default_sampling` holds the sampling defaults of
    the checkpoint's generation_config.json, `eos_token_ids` the ids that end generation.
    """

    def __init__(
        self,
        client: EngineClient,
        pool: TokenizerPool,
        *,
        eos_token_ids: tuple[int, ...] = (),
        default_max_tokens: int | None = None,
        default_sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.client = client
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self.default_max_tokens = default_max_tokens
        self.default_sampling = dict(default_sampling or {})

    @classmethod
    def from_config(cls, client: EngineClient, pool: TokenizerPool, config: PagodaConfig) -> TextGenerator:
        """The generator for the configured checkpoint; `pool` has been started.

        Raises `CheckpointError` when the checkpoint's configuration cannot be read.
        """
        defaults = read_checkpoint_defaults(config)
        if client.ready is not None:
            pool.max_model_len = client.ready.max_model_len
        return cls(
            client,
            pool,
            eos_token_ids=defaults.eos_token_ids(pool.tokenizer),
            default_max_tokens=config.default_max_tokens,
            default_sampling=defaults.sampling,
        )

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """`SamplingParams` from what the client gave; the checkpoint's defaults apply to fields not given.

        Raises `InvalidRequestError` naming the field for an unknown name or an impossible value.
        """
        for name in given:
            if name not in _SAMPLING_NAMES:
                raise InvalidRequestError(f"there is no sampling parameter {name!r}", name)
        return SamplingParams(**{**self.default_sampling, **given})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Stream the completion(s) of a request.

        Chunks of the `params.n` choices come interleaved in the order they are made. With `echo` the first chunk of each
        choice begins with the prompt's text. Closing the iterator, cancelling the task that reads it, or any error aborts what
        is still running.

        Raises, before the first chunk: `InvalidRequestError`, `QueueFullError`, `EngineNotReadyError`; at any time:
        `EngineDeadError`, `RequestFailedError`.
        """
        limits = self._limits()
        params, prompt = request.params, request.prompt
        if isinstance(prompt, str):
            prompt_token_ids = await self.pool.encode(prompt, add_special_tokens=request.add_special_tokens)
            echoed = prompt if request.echo else ""
        else:
            prompt_token_ids = prompt
            echoed = await self._decode_prompt(prompt, params) if request.echo else ""
        requests = validate_request(request, prompt_token_ids, self.pool.tokenizer, limits)
        states = [
            RequestTextState(self.pool.tokenizer, prompt_token_ids, params, index=index, echo=echoed)
            for index in range(params.n)
        ]
        if params.n == 1:
            async with self._outputs(requests[0]) as outputs:
                async for output in outputs:
                    yield states[0].process(output)
                    if states[0].finished:
                        return
            raise RequestFailedError(UNFINISHED)
        async with aclosing(self._run_all(requests, states)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _limits(self) -> RequestLimits:
        ready = self.client.ready
        if ready is None:
            raise EngineNotReadyError("the model is still loading")
        self.pool.max_model_len = ready.max_model_len
        return RequestLimits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=self.eos_token_ids,
            default_max_tokens=self.default_max_tokens,
        )

    async def _decode_prompt(self, prompt: list[int], params: SamplingParams) -> str:
        return await self.pool.decode(prompt, skip_special_tokens=params.skip_special_tokens)

    def _outputs(self, request: EngineRequest) -> aclosing[AsyncGenerator[EngineOutput, None]]:
        """The engine's outputs for one sequence. The request is aborted on every exit, also after a stop string."""
        return aclosing(cast("AsyncGenerator[EngineOutput, None]", self.client.submit(request)))

    async def _run_all(
        self, requests: list[EngineRequest], states: list[RequestTextState]
    ) -> AsyncGenerator[GenerationChunk, None]:
        """All sequences of one request; the first error of any ends them all. Each is read one chunk ahead at most."""
        queue: asyncio.Queue[GenerationChunk | Exception | None] = asyncio.Queue(maxsize=len(requests))

        async def forward(request: EngineRequest, state: RequestTextState) -> None:
            try:
                async with self._outputs(request) as outputs:
                    async for output in outputs:
                        await queue.put(state.process(output))
                        if state.finished:
                            break
                    else:
                        raise RequestFailedError(UNFINISHED)
                await queue.put(None)
            except Exception as error:  # handed to the reader of the queue, who raises it
                await queue.put(error)

        tasks = [asyncio.create_task(forward(*pair)) for pair in zip(requests, states, strict=True)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
