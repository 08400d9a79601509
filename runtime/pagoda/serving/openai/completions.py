"""/v1/completions: prompts to text."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from typing_extensions import override

from pagoda.errors import NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import check_cost, limit_time
from pagoda.serving.openai.call import Call, Choice
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import CompletionLogprobs, joined, prompt_logprobs
from pagoda.serving.openai.requests import check_stream_options, generation_request
from pagoda.serving.openai.types import CompletionRequest
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.pool import TokenizerPool


class CompletionCall(Call):
    """Prompts to be completed."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, context: ServingContext, request: CompletionRequest, seconds: float | None) -> None:
        """Check everything that can be checked before a prompt is tokenized; `seconds` is the header's limit."""
        check_stream_options(request)
        # An echoed prompt has log-probabilities too.
        overrides = {"prompt_logprobs": request.logprobs} if request.echo and request.logprobs is not None else {}
        job = limit_time(generation_request(request, context.generator.sampling_params, overrides), seconds)
        if request.stream and overrides and job.params.n > 1:
            raise NotSupportedError("echo with logprobs and n > 1 cannot be streamed; leave stream out, or n")
        super().__init__(context, request)
        self._request = request
        add_special_tokens = request.add_special_tokens is not False
        check_cost(job.params, len(request.prompt))
        self._jobs = [replace(job, prompt=prompt, add_special_tokens=add_special_tokens) for prompt in request.prompt]

    @override
    async def jobs(self) -> list[GenerationRequest]:
        return self._jobs

    @override
    def choice(self, index: int) -> Choice:
        return _CompletionChoice(index, self._request, self._context.generator.pool)


class _CompletionChoice(Choice):
    def __init__(self, index: int, request: CompletionRequest, pool: TokenizerPool) -> None:
        super().__init__(index)
        self._request = request
        self._pool = pool
        self._logprobs = CompletionLogprobs()

    @override
    async def whole(self, result: CompletionOutput) -> dict[str, Any]:
        return await self._choice(result)

    @override
    async def deltas(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        choice = await self._choice(chunk)
        shows = choice["text"] or choice["logprobs"] or choice["finish_reason"] or "prompt_logprobs" in choice
        return [choice] if shows else []

    @override
    def text_delta(self, text: str) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": None, **finish_fields(None, None)}

    async def _choice(self, part: GenerationChunk | CompletionOutput) -> dict[str, Any]:
        """The choice that shows `part`, a chunk or a whole sequence."""
        choice: dict[str, Any] = {
            "index": self.index,
            "text": part.text,
            "logprobs": await self._logprobs_of(part),
            **finish_fields(part.finish_reason, part.stop_reason),
        }
        if self._request.prompt_logprobs is not None and part.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(part.prompt_logprobs)
        return choice

    async def _logprobs_of(self, part: GenerationChunk | CompletionOutput) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        parts = []
        if self._request.echo and part.prompt_logprobs is not None:
            first_id = (part.prompt_token_ids or [])[:1]
            token, text = await asyncio.gather(
                self._pool.decode(first_id, skip_special_tokens=False),
                self._pool.decode(first_id, skip_special_tokens=True),
            )
            parts.append(self._logprobs.add_first(token, len(text)))
            parts.append(self._logprobs.add([position for position in part.prompt_logprobs if position is not None]))
        if part.logprobs:
            parts.append(self._logprobs.add(part.logprobs))
        return joined(parts) if parts else None
