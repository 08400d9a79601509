"""/v1/completions: prompts to text."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import check_job_count, limit_time
from pagoda.serving.http.event_stream import DONE, Events, EventTemplate, event
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import CompletionLogprobs, joined, prompt_logprobs
from pagoda.serving.openai.requests import PROMPT_FORMS, check_stream_options, generation_request
from pagoda.serving.openai.types import CompletionRequest
from pagoda.serving.openai.usage import UsageCounter
from pagoda.text.output import CompletionOutput, GenerationChunk


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A checked request on its way."""

    context: ServingContext
    request: CompletionRequest
    jobs: list[GenerationRequest]
    answer_id: str
    created: int

    @classmethod
    def prepare(cls, context: ServingContext, request: CompletionRequest, seconds: float | None) -> CompletionCall:
        """Check everything that can be checked before the engine is asked; `seconds` is the header's limit."""
        check_stream_options(request)
        # An echoed prompt has log-probabilities too.
        overrides = {"prompt_logprobs": request.logprobs} if request.echo and request.logprobs is not None else {}
        job = limit_time(generation_request(request, context.generator.sampling_params, overrides), seconds)
        if request.stream and overrides and job.params.n > 1:
            raise NotSupportedError("echo with logprobs and n > 1 cannot be streamed; leave stream out, or n")
        add_special_tokens = request.add_special_tokens is not False
        jobs = [
            replace(job, prompt=prompt, add_special_tokens=add_special_tokens)
            for prompt in split_prompt(request.prompt)
        ]
        check_job_count(jobs)
        return cls(context, request, jobs, f"cmpl-{uuid.uuid4().hex}", int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answer when everything is done."""
        results = await self.context.runner.collect_all(self.jobs, self.answer_id)
        usage = UsageCounter()
        choices = []
        for prompt_index, sequences in enumerate(results):
            for sequence_index, result in enumerate(sequences):
                # The engine computes them for the first sequence of a prompt only; they are the same for all.
                chunk = replace(_as_chunk(result), prompt_logprobs=sequences[0].prompt_logprobs)
                usage.add(prompt_index, chunk)
                choices.append(await _Choice(self, prompt_index, sequence_index).piece(chunk))
        return {**self._head(choices), "usage": usage.usage()}

    async def events(self) -> Events:
        """The answer in pieces."""
        choices: dict[tuple[int, int], _Choice] = {}
        usage = UsageCounter()
        stream_options = self.request.stream_options
        wants_usage = bool(stream_options and stream_options.include_usage)
        continuous = bool(stream_options and stream_options.continuous_usage_stats)
        async with aclosing(self.context.runner.stream_all(self.jobs, self.answer_id)) as chunks:
            async for prompt_index, chunk in chunks:
                usage.add(prompt_index, chunk)
                key = (prompt_index, chunk.index)
                choice = choices.get(key)
                if choice is None:
                    choice = choices[key] = _Choice(self, prompt_index, chunk.index)
                elif not continuous and choice.is_plain(chunk):
                    if chunk.text:
                        yield choice.template(chunk.text)
                    continue
                piece = await choice.piece(chunk)
                if not piece["text"] and piece["finish_reason"] is None and piece["logprobs"] is None:
                    continue
                content = self._head([piece])
                if wants_usage:
                    content["usage"] = usage.usage() if continuous else None
                yield event(content)
        if wants_usage:
            yield event({**self._head([]), "usage": usage.usage()})
        yield DONE

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.context.model_name,
            "choices": choices,
        }


class _Choice:
    """One choice of an answer, and what must be remembered between its pieces."""

    def __init__(self, call: CompletionCall, prompt_index: int, sequence_index: int) -> None:
        self._call = call
        self._index = prompt_index * call.jobs[prompt_index].params.n + sequence_index
        self._logprobs = CompletionLogprobs()

    @cached_property
    def template(self) -> EventTemplate:
        """The events of this choice that bring nothing but text."""
        options = self._call.request.stream_options
        usage = {"usage": None} if options and options.include_usage else {}

        def content(text: str) -> dict[str, Any]:
            piece = {"index": self._index, "text": text, "logprobs": None, **finish_fields(None, None)}
            return {**self._call._head([piece]), **usage}

        return EventTemplate(content)

    def is_plain(self, chunk: GenerationChunk) -> bool:
        """Whether `chunk`, not the first of its sequence, brings nothing but text."""
        return chunk.finish_reason is None and self._call.request.logprobs is None

    async def piece(self, chunk: GenerationChunk) -> dict[str, Any]:
        """The choice as an answer shows it, for what `chunk` brings."""
        piece: dict[str, Any] = {
            "index": self._index,
            "text": chunk.text,
            "logprobs": await self._piece_logprobs(chunk),
            **finish_fields(chunk.finish_reason, chunk.stop_reason),
        }
        if self._call.request.prompt_logprobs is not None and chunk.prompt_logprobs is not None:
            piece["prompt_logprobs"] = prompt_logprobs(chunk.prompt_logprobs)
        return piece

    async def _piece_logprobs(self, chunk: GenerationChunk) -> dict[str, Any] | None:
        if self._call.request.logprobs is None:
            return None
        parts = []
        if self._call.request.echo and chunk.prompt_logprobs is not None:
            first_id = (chunk.prompt_token_ids or [])[:1]
            pool = self._call.context.generator.pool
            token, shown = await asyncio.gather(
                pool.decode(first_id, skip_special_tokens=False), pool.decode(first_id, skip_special_tokens=True)
            )
            parts.append(self._logprobs.add_first(token, len(shown)))
            parts.append(self._logprobs.add([position for position in chunk.prompt_logprobs if position is not None]))
        if chunk.logprobs:
            parts.append(self._logprobs.add(chunk.logprobs))
        return joined(parts) if parts else None


def split_prompt(prompt: object) -> list[str | list[int]]:
    """The prompts of a request: text, or token ids, one or several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return [_ids(prompt)]
        return [entry if isinstance(entry, str) else _ids(entry) for entry in prompt]
    raise InvalidRequestError(f"prompt must be {PROMPT_FORMS}, and not empty", "prompt")


def _ids(entry: object) -> list[int]:
    if not isinstance(entry, list) or not entry or min(entry) < 0 or max(entry) >= 2**31:
        raise InvalidRequestError("a prompt of token ids must hold at least one id, and none below 0", "prompt")
    return entry


def _as_chunk(result: CompletionOutput) -> GenerationChunk:
    """A finished sequence as the one chunk it could have been."""
    return GenerationChunk(
        text=result.text,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        finish_reason=result.finish_reason,
        stop_reason=result.stop_reason,
        num_prompt_tokens=result.num_prompt_tokens,
        prompt_token_ids=result.prompt_token_ids,
        prompt_logprobs=result.prompt_logprobs,
        num_cached_tokens=result.num_cached_tokens,
    )
