"""/v1/chat/completions: a conversation to the assistant's next message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import override

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import MAX_LOGPROBS
from pagoda.serving.generation import check_cost, limit_time
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.call import Call, Choice
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import chat_logprobs, prompt_logprobs
from pagoda.serving.openai.requests import check_stream_options, generation_request, template_messages
from pagoda.serving.openai.tools import answer_options, constrained, is_named, reasoning_variables, template_tools
from pagoda.serving.openai.types import ChatCompletionRequest, TokenizeRequest
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.responses.message import ArgumentsDelta, CallDelta, ContentDelta, ReasoningDelta


class ChatCall(Call):
    """A conversation to be continued; the chat template is applied when the call runs."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, model: ServedModel, request: ChatCompletionRequest, seconds: float | None) -> None:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        check_stream_options(request)
        if (request.model_extra or {}).get("echo"):
            raise NotSupportedError("echo is not supported for conversations; /v1/completions has it")
        overrides: dict[str, Any] = {"logprobs": _num_logprobs(request)}
        if request.max_completion_tokens is not None:
            overrides["max_tokens"] = request.max_completion_tokens
        super().__init__(model, request)
        self._request = request
        self._messages = template_messages(request.messages)
        generator = model.generator
        job = limit_time(generation_request(request, generator.sampling_params, overrides), seconds)
        if request.prediction is not None:
            job = replace(job, prediction=request.prediction.text)
        check_cost(job.params, 1)
        job = replace(job, answer=answer_options(request, generator.answer_format))
        self._job = constrained(request, job, generator.answer_format)
        self._variables = reasoning_variables(request.reasoning_effort, request.enable_thinking)

    @override
    async def jobs(self) -> list[GenerationRequest]:
        tools = template_tools(self._request.tools, self._request.tool_choice)
        prompt = await encode_chat(self._model, self._request, self._messages, tools=tools, variables=self._variables)
        return [replace(self._job, prompt=prompt)]

    @override
    def choice(self, index: int) -> Choice:
        request = self._request
        return _ChatChoice(
            index,
            has_logprobs=bool(request.logprobs),
            as_token_ids=bool(request.return_tokens_as_token_ids),
            returns_ids=self._returns_ids,
            shows_reasoning=request.include_reasoning is not False,
            names_calls=not is_named(request.tool_choice),
        )

    @override
    def members_of(self, results: list[list[CompletionOutput]]) -> dict[str, Any]:
        ((first, *_),) = results
        members: dict[str, Any] = {}
        if first.prompt_logprobs is not None:
            members["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs)
        if self._returns_ids:
            members["prompt_token_ids"] = first.prompt_token_ids
        return members

    @override
    def members_of_chunk(self, chunk: GenerationChunk) -> dict[str, Any]:
        if not self._returns_ids or chunk.index or chunk.prompt_token_ids is None:
            return {}
        return {"prompt_token_ids": chunk.prompt_token_ids}


class _ChatChoice(Choice):
    """`names_calls`: calls have a finish reason of their own, as OpenAI has it unless the request named the function."""

    def __init__(
        self,
        index: int,
        *,
        has_logprobs: bool,
        as_token_ids: bool,
        returns_ids: bool,
        shows_reasoning: bool,
        names_calls: bool,
    ) -> None:
        super().__init__(index)
        self._names_calls = names_calls
        self._has_logprobs = has_logprobs
        self._as_token_ids = as_token_ids
        self._returns_ids = returns_ids
        self._shows_reasoning = shows_reasoning
        self._has_calls = False

    @override
    def opening(self) -> dict[str, Any]:
        return self._delta({"role": "assistant", "content": ""})

    @override
    async def whole(self, result: CompletionOutput) -> dict[str, Any]:
        message = result.message
        calls = message.tool_calls
        shown: dict[str, Any] = {"role": "assistant", "content": message.content}
        if not message.content and (calls or message.reasoning):
            shown["content"] = None
        if message.reasoning and self._shows_reasoning:
            shown |= _reasoning_members(message.reasoning)
        if calls:
            shown["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {
            "index": self.index,
            "message": shown,
            "logprobs": chat_logprobs(result.logprobs or [], as_token_ids=self._as_token_ids)
            if self._has_logprobs
            else None,
            **finish_fields(result.finish_reason, result.stop_reason, has_calls=bool(calls) and self._names_calls),
            **({"token_ids": list(result.token_ids)} if self._returns_ids else {}),
        }

    @override
    async def deltas(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        pieces = self._pieces(chunk)
        shows_ids = self._returns_ids and bool(chunk.token_ids)
        if not pieces and (chunk.logprobs or shows_ids or chunk.finish_reason is not None):
            pieces = [{}]
        parts = [self._delta(piece) for piece in pieces]
        if chunk.logprobs:
            parts[0]["logprobs"] = chat_logprobs(chunk.logprobs, as_token_ids=self._as_token_ids)
        if shows_ids:
            parts[0]["token_ids"] = chunk.token_ids
        if chunk.finish_reason is not None:
            parts[-1] |= finish_fields(chunk.finish_reason, chunk.stop_reason, has_calls=self._has_calls)
        return parts

    def _pieces(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """What is new of the message. OpenAI's clients join the strings under one key, so names and ids are sent once."""
        if chunk.deltas is None:
            return [{"content": chunk.text}] if chunk.text else []
        pieces: list[dict[str, Any]] = []
        for delta in chunk.deltas:
            match delta:
                case ContentDelta(text):
                    pieces.append({"content": text})
                case ReasoningDelta(text):
                    if self._shows_reasoning:
                        pieces.append(_reasoning_members(text))
                case CallDelta(index, call_id, name):
                    self._has_calls = self._names_calls
                    function = {"name": name, "arguments": ""}
                    call = {"index": index, "id": call_id, "type": "function", "function": function}
                    pieces.append({"tool_calls": [call]})
                case ArgumentsDelta(index, text):
                    pieces.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        return pieces

    @override
    def text_delta(self, text: str) -> dict[str, Any]:
        return self._delta({"content": text})

    def _delta(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": message, "logprobs": None, "finish_reason": None}


def _reasoning_members(text: str) -> dict[str, str]:
    """Reasoning under both of the names that clients read: vLLM's, and that of SGLang, llama.cpp and DeepSeek."""
    return {"reasoning": text, "reasoning_content": text}


def within_context(job: GenerationRequest, model: ServedModel) -> GenerationRequest:
    """`job`, whose prompt is encoded, with `max_tokens` cut to what fits the model's context: a bound, as protocols that give
    it in every request mean it.
    """
    ready, max_tokens = model.ready, job.params.max_tokens
    if ready is None or max_tokens is None:
        return job
    remaining = max(1, ready.max_model_len - len(job.prompt))
    return job if max_tokens <= remaining else replace(job, params=replace(job.params, max_tokens=remaining))


async def encode_chat(
    model: ServedModel,
    request: ChatCompletionRequest | TokenizeRequest,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation in `request`, whose `messages` are in the template's form, through the chat template."""
    continues = bool(request.continue_final_message)
    add_generation_prompt = request.add_generation_prompt
    return await model.generator.pool.render_chat_and_encode(
        messages,
        tools=tools,
        add_generation_prompt=not continues if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continues,
        add_special_tokens=bool(request.add_special_tokens),
        template_variables={**(variables or {}), **(request.chat_template_kwargs or {})} or None,
    )


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    top = request.top_logprobs
    if top and not request.logprobs:
        raise InvalidRequestError("top_logprobs is allowed only with logprobs: true", "top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be an integer between 0 and {MAX_LOGPROBS}, got {top}", "top_logprobs"
        )
    return (top or 0) if request.logprobs else None
