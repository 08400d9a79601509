"""/v1/chat/completions: a conversation to the assistant's next message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import override

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import MAX_LOGPROBS
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import limit_time
from pagoda.serving.openai.call import Call, Choice
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import chat_logprobs, prompt_logprobs
from pagoda.serving.openai.requests import check_stream_options, generation_request, template_messages
from pagoda.serving.openai.types import ChatCompletionRequest, TokenizeRequest
from pagoda.text.output import CompletionOutput, GenerationChunk


class ChatCall(Call):
    """A conversation to be continued; the chat template is applied when the call runs."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, context: ServingContext, request: ChatCompletionRequest, seconds: float | None) -> None:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        check_stream_options(request)
        if request.response_format is not None and request.response_format.type != "text":
            raise NotSupportedError(f"response_format {request.response_format.type[:40]!r} is not supported; text is")
        if (request.model_extra or {}).get("echo"):
            raise NotSupportedError("echo is not supported for conversations; /v1/completions has it")
        overrides: dict[str, Any] = {"logprobs": _num_logprobs(request)}
        if request.max_completion_tokens is not None:
            overrides["max_tokens"] = request.max_completion_tokens
        super().__init__(context, request)
        self._request = request
        self._job = limit_time(generation_request(request, context.generator.sampling_params, overrides), seconds)

    @override
    async def jobs(self) -> list[GenerationRequest]:
        return [replace(self._job, prompt=await encode_chat(self._context, self._request))]

    @override
    def choice(self, index: int) -> Choice:
        return _ChatChoice(index, has_logprobs=bool(self._request.logprobs))

    @override
    def members_of(self, results: list[list[CompletionOutput]]) -> dict[str, Any]:
        ((first, *_),) = results
        return {} if first.prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs(first.prompt_logprobs)}


class _ChatChoice(Choice):
    def __init__(self, index: int, *, has_logprobs: bool) -> None:
        super().__init__(index)
        self._has_logprobs = has_logprobs
        self._has_begun = False

    @override
    async def whole(self, result: CompletionOutput) -> dict[str, Any]:
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": result.text},
            "logprobs": chat_logprobs(result.logprobs or []) if self._has_logprobs else None,
            **finish_fields(result.finish_reason, result.stop_reason),
        }

    @override
    async def deltas(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        deltas = []
        if not self._has_begun:
            self._has_begun = True
            deltas.append(self._delta({"role": "assistant", "content": ""}))
        if chunk.text or chunk.logprobs or chunk.finish_reason is not None:
            delta = self._delta({"content": chunk.text} if chunk.text else {})
            if chunk.logprobs:
                delta["logprobs"] = chat_logprobs(chunk.logprobs)
            if chunk.finish_reason is not None:
                delta |= finish_fields(chunk.finish_reason, chunk.stop_reason)
            deltas.append(delta)
        return deltas

    @override
    def text_delta(self, text: str) -> dict[str, Any]:
        return self._delta({"content": text})

    def _delta(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": message, "logprobs": None, "finish_reason": None}


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


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    top = request.top_logprobs
    if top is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs is allowed only with logprobs: true", "top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be an integer between 0 and {MAX_LOGPROBS}, got {top}", "top_logprobs"
        )
    return (top or 0) if request.logprobs else None
