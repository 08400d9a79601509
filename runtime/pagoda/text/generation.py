"""From a prompt to a stream of text over the engine client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineNotReadyError, InvalidRequestError, RequestFailedError
from pagoda.request import EngineRequest, GenerationRequest, TokenIds
from pagoda.sampling.params import SamplingParams
from pagoda.structured.admission import GrammarAdmission
from pagoda.text.checkpoint_defaults import read_checkpoint_defaults
from pagoda.text.output import GenerationChunk, PositionLogprobs, TokenLogprob
from pagoda.text.output_processor import RequestMessageState, RequestTextState
from pagoda.text.responses.checkpoint import AnswerFormat
from pagoda.text.responses.checkpoint import answer_format as make_answer_format
from pagoda.text.streams import merge_streams
from pagoda.text.validation import RequestLimits, check_num_tokens, validate_request

if TYPE_CHECKING:
    from pagoda.engine.client.interface import EngineClient
    from pagoda.engine.client.request_queue import QueuePlaces
    from pagoda.text.pool import TokenizerPool

__all__ = ["GenerationChunk", "PositionLogprobs", "TextGenerator", "TokenLogprob"]

UNFINISHED = "the engine left a request without finishing it"
_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


class TextGenerator:
    """Tokenizes, validates, fans out, detokenizes and cuts at stop strings; one for each served model.

    `pool` and `client` are public: `await generator.pool.encode(text)`, `.decode(ids)`,
    `.render_chat_and_encode(messages, ...)` serve the routes that need tokens and no generation.
    `default_max_tokens` is used when `max_tokens` was not given; `default_sampling` holds the sampling defaults of
    the checkpoint's generation_config.json, `eos_token_ids` the ids that end generation, `answer_format` how the checkpoint's
    answers mark reasoning and tool calls, `directory` where its files are. `grammars` compiles each on trial before the engine
    sees it; None leaves it to the engine.
    """

    def __init__(
        self,
        client: EngineClient,
        pool: TokenizerPool,
        *,
        eos_token_ids: tuple[int, ...] = (),
        default_max_tokens: int | None = None,
        default_sampling: Mapping[str, Any] | None = None,
        answer_format: AnswerFormat | None = None,
        grammars: GrammarAdmission | None = None,
        directory: str | None = None,
    ) -> None:
        self.client = client
        self.directory = directory
        self._grammars = grammars
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self.default_max_tokens = default_max_tokens
        self.default_sampling = dict(default_sampling or {})
        self.answer_format = answer_format

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
            default_max_tokens=defaults.max_tokens,
            default_sampling=defaults.sampling,
            answer_format=make_answer_format(
                pool.tokenizer,
                pool.chat_template_sources,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
            ),
            grammars=GrammarAdmission(
                config.tokenizer or config.model or "",
                timeout=config.structured_outputs_timeout_seconds,
                caller=pool.caller,
            ),
            directory=config.model,
        )

    async def shutdown(self) -> None:
        """End the processes that compile grammars."""
        if self._grammars is not None:
            await self._grammars.close()

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """`SamplingParams` from what the client gave; the checkpoint's defaults apply to fields not given.

        Raises `InvalidRequestError` naming the field for an unknown name or an impossible value.
        """
        for name in given:
            if name not in _SAMPLING_NAMES:
                raise InvalidRequestError(f"there is no sampling parameter {name!r}", name)
        return SamplingParams(**{**self.default_sampling, **given})

    async def generate(
        self, request: GenerationRequest, places: QueuePlaces | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Stream the completion(s) of a request.

        `places`: of its sequences, where it is one of several; of its own `params.n` it sees to it itself.
        Chunks of the `params.n` choices come interleaved in the order they are made. With `echo` the first chunk of each
        choice begins with the prompt's text. Closing the iterator, cancelling the task that reads it, or any error aborts what
        is still running.

        Raises, before the first chunk: `InvalidRequestError`, `QueueFullError`, `EngineNotReadyError`; at any time:
        `EngineDeadError`, `RequestFailedError`.
        """
        request, requests, echoed = await self._admitted(request)
        params, prompt_token_ids = request.params, requests[0].prompt_token_ids
        states = [self._state(request, prompt_token_ids, index, echoed) for index in range(params.n)]
        if params.n == 1:  # read right here: each generator in between would cost every token a third of a microsecond
            async with self._outputs(requests[0], places) as outputs:
                async for output in outputs:
                    yield states[0].process(output)
                    if states[0].finished:
                        return
            raise RequestFailedError(UNFINISHED)
        with self.client.reserve(request.tenant, params.n) if places is None else nullcontext(places) as places:
            sequences = [self._chunks(*pair, places) for pair in zip(requests, states, strict=True)]
            async with aclosing(merge_streams(sequences)) as chunks:
                async for _, chunk in chunks:
                    yield chunk

    async def rendered(self, request: GenerationRequest) -> EngineRequest:
        """What the engine would be asked, of several choices for the first. Raises what `generate` raises before a chunk."""
        return (await self._admitted(request))[1][0]

    async def _admitted(self, request: GenerationRequest) -> tuple[GenerationRequest, list[EngineRequest], str]:
        """The request with its grammar placed, what the engine is asked for each choice, and the prompt's text for `echo`."""
        limits = self._limits()
        params, prompt = request.params, request.prompt
        if params.structured_outputs is not None and self._grammars is not None:
            await self._grammars.check(params.structured_outputs)
        if isinstance(prompt, str):
            prompt_token_ids = await self.pool.encode(prompt, add_special_tokens=request.add_special_tokens)
            echoed = prompt if request.echo else ""
        else:
            check_num_tokens(len(prompt), limits)
            prompt_token_ids = prompt.tolist() if isinstance(prompt, TokenIds) else prompt
            echoed = await self._decode_prompt(prompt_token_ids, params) if request.echo else ""
        if request.answer is not None and self.answer_format is not None:
            spec = self.answer_format.constrained(params.structured_outputs, request.answer, prompt_token_ids)
            request = replace(request, params=replace(params, structured_outputs=spec))
        self.pool.check_response(len(echoed) * params.n)
        prediction: list[int] = []
        if request.prediction and limits.num_speculative_tokens:
            prediction = await self.pool.encode(request.prediction, add_special_tokens=False)
        return request, validate_request(request, prompt_token_ids, self.pool.tokenizer, limits, prediction), echoed

    def _state(self, request: GenerationRequest, prompt: list[int], index: int, echoed: str) -> RequestTextState:
        params = request.params
        if request.answer is not None and self.answer_format is not None:
            skip_special = params.skip_special_tokens
            parser = self.answer_format.parser(request.answer, prompt, skip_special=skip_special)
            if parser is not None:
                return RequestMessageState(self.pool.tokenizer, prompt, params, parser, index=index)
        return RequestTextState(self.pool.tokenizer, prompt, params, index=index, echo=echoed)

    def _limits(self) -> RequestLimits:
        ready = self.client.ready
        if ready is None:
            raise EngineNotReadyError("the model is still loading")
        self.pool.max_model_len = ready.max_model_len
        return RequestLimits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            num_speculative_tokens=ready.num_speculative_tokens,
            eos_token_ids=self.eos_token_ids,
            default_max_tokens=self.default_max_tokens,
        )

    async def _decode_prompt(self, prompt: list[int], params: SamplingParams) -> str:
        return await self.pool.decode(prompt, skip_special_tokens=params.skip_special_tokens)

    def _outputs(
        self, request: EngineRequest, places: QueuePlaces | None
    ) -> aclosing[AsyncGenerator[EngineOutput, None]]:
        """The engine's outputs of one sequence. However this is left, after a stop string too, the request is aborted."""
        return aclosing(cast("AsyncGenerator[EngineOutput, None]", self.client.submit(request, places)))

    async def _chunks(
        self, request: EngineRequest, state: RequestTextState, places: QueuePlaces
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks of one of several sequences."""
        async with self._outputs(request, places) as outputs:
            async for output in outputs:
                yield state.process(output)
                if state.finished:
                    return
        raise RequestFailedError(UNFINISHED)
