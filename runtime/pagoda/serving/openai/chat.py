"""/v1/chat/completions: a conversation to the assistant's next message."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import MAX_LOGPROBS
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import limit_time
from pagoda.serving.http.event_stream import DONE, Events, EventTemplate, event
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import chat_logprobs, prompt_logprobs
from pagoda.serving.openai.requests import check_stream_options, generation_request, template_messages
from pagoda.serving.openai.types import ChatCompletionRequest, TokenizeRequest
from pagoda.serving.openai.usage import UsageCounter
from pagoda.text.output import CompletionOutput, GenerationChunk


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked request on its way; the chat template is applied when it starts."""

    context: ServingContext
    request: ChatCompletionRequest
    job: GenerationRequest
    answer_id: str
    created: int

    @classmethod
    def prepare(cls, context: ServingContext, request: ChatCompletionRequest, seconds: float | None) -> ChatCall:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        check_stream_options(request)
        if request.response_format is not None and request.response_format.type != "text":
            raise NotSupportedError(f"response_format {request.response_format.type[:40]!r} is not supported; text is")
        if (request.model_extra or {}).get("echo"):
            raise NotSupportedError("echo is not supported for conversations; /v1/completions has it")
        overrides: dict[str, Any] = {"logprobs": _num_logprobs(request)}
        if request.max_completion_tokens is not None:
            overrides["max_tokens"] = request.max_completion_tokens
        job = limit_time(generation_request(request, context.generator.sampling_params, overrides), seconds)
        return cls(context, request, job, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answer when everything is done."""
        results = await self.context.runner.collect(await self._job(), self.answer_id)
        usage = UsageCounter()
        for result in results:
            usage.add(0, _counts(result))
        answer = self._head("chat.completion", [self._choice(index, result) for index, result in enumerate(results)])
        answer["usage"] = usage.usage()
        if results[0].prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(results[0].prompt_logprobs)
        return answer

    async def events(self) -> Events:
        """The answer in pieces; each choice begins with the role."""
        templates: dict[int, EventTemplate] = {}
        usage = UsageCounter()
        stream_options = self.request.stream_options
        wants_usage = bool(stream_options and stream_options.include_usage)
        continuous = bool(stream_options and stream_options.continuous_usage_stats)
        async with aclosing(self.context.runner.stream(await self._job(), self.answer_id)) as chunks:
            async for chunk in chunks:
                usage.add(0, chunk)
                template = templates.get(chunk.index)
                if template is not None and not continuous and not chunk.logprobs and chunk.finish_reason is None:
                    if chunk.text:
                        yield template(chunk.text)
                    continue
                pieces = self._pieces(chunk)
                if template is None:
                    templates[chunk.index] = self._template(chunk.index, wants_usage)
                    pieces.insert(0, _piece(chunk.index, {"role": "assistant", "content": ""}))
                for piece in pieces:
                    content = self._head("chat.completion.chunk", [piece])
                    if wants_usage:
                        content["usage"] = usage.usage() if continuous else None
                    yield event(content)
        if wants_usage:
            yield event({**self._head("chat.completion.chunk", []), "usage": usage.usage()})
        yield DONE

    async def _job(self) -> GenerationRequest:
        return replace(self.job, prompt=await encode_chat(self.context, self.request))

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.context.model_name,
            "choices": choices,
        }

    def _choice(self, index: int, result: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": result.text},
            "logprobs": chat_logprobs(result.logprobs or []) if self.request.logprobs else None,
            **finish_fields(result.finish_reason, result.stop_reason),
        }

    def _template(self, index: int, wants_usage: bool) -> EventTemplate:
        """The events of a choice that bring nothing but text."""
        usage = {"usage": None} if wants_usage else {}
        return EventTemplate(
            lambda text: {**self._head("chat.completion.chunk", [_piece(index, {"content": text})]), **usage}
        )

    def _pieces(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """What `chunk` brings, if anything that is shown."""
        if not (chunk.text or chunk.logprobs or chunk.finish_reason is not None):
            return []
        piece = _piece(chunk.index, {"content": chunk.text} if chunk.text else {})
        if chunk.logprobs:
            piece["logprobs"] = chat_logprobs(chunk.logprobs)
        if chunk.finish_reason is not None:
            piece |= finish_fields(chunk.finish_reason, chunk.stop_reason)
        return [piece]


async def encode_chat(context: ServingContext, request: ChatCompletionRequest | TokenizeRequest) -> list[int]:
    """Token ids of the conversation in `request`, through the chat template."""
    continues = bool(request.continue_final_message)
    add_generation_prompt = request.add_generation_prompt
    return await context.generator.pool.render_chat_and_encode(
        template_messages(request.messages or []),
        add_generation_prompt=not continues if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continues,
        add_special_tokens=bool(request.add_special_tokens),
        template_variables=request.chat_template_kwargs,
    )


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    top = request.top_logprobs
    if top is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs is allowed only with logprobs: true", "top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be an integer between 0 and {MAX_LOGPROBS}, got {top}", "top_logprobs"
        )
    return (top or 0) if request.logprobs else None


def _counts(result: CompletionOutput) -> GenerationChunk:
    """What the usage of a finished sequence is counted from."""
    return GenerationChunk(
        token_ids=result.token_ids,
        num_prompt_tokens=result.num_prompt_tokens,
        num_cached_tokens=result.num_cached_tokens,
    )
