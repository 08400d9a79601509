"""A request of /v1/messages, from checked to its message: whole, or in Anthropic's events.

    message_start  ping  (content_block_start  content_block_delta…  content_block_stop)…  message_delta  message_stop

Blocks follow one another: reasoning is a block of type thinking, content one of type text, each call one of type tool_use.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.serving.anthropic.requests import chat_request
from pagoda.serving.anthropic.types import MessagesRequest
from pagoda.serving.http.event_stream import Events, named_event
from pagoda.serving.json_values import arguments_object
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.chat import ChatCall, within_context
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.responses.message import ArgumentsDelta, CallDelta, ContentDelta, MessageDelta, ReasoningDelta


class MessagesCall:
    """A checked request; `whole` or `events` runs it, once."""

    def __init__(self, model: ServedModel, request: MessagesRequest, seconds: float | None) -> None:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        self._model = model
        format = model.generator.answer_format
        bounds_reasoning = format is not None and format.can_end_reasoning
        self._chat = ChatCall(model, chat_request(request, bounds_reasoning=bounds_reasoning), seconds)
        self._message_id = f"msg_{uuid.uuid4().hex}"

    async def whole(self) -> dict[str, Any]:
        """The message when it is done; cancelling the call aborts it in the engine."""
        (result,) = await self._model.runner.collect(await self._job(), self._message_id)
        message = result.message
        blocks: list[dict[str, Any]] = []
        if message.reasoning:
            blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": _signature()})
        if message.content:
            blocks.append({"type": "text", "text": message.content})
        blocks += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_object(call.arguments)}
            for call in message.tool_calls
        ]
        return self._message(blocks, _stop(result, has_calls=bool(message.tool_calls)), _usage(result))

    async def events(self) -> Events:
        """The message in events; closing the iterator aborts it in the engine."""
        job = await self._job()
        blocks = _Blocks()
        usage = _Usage()
        async with aclosing(self._model.runner.stream(job, self._message_id)) as chunks:
            async for chunk in chunks:
                if usage.add(chunk):
                    start = self._message([], {"stop_reason": None, "stop_sequence": None}, usage.shown())
                    yield named_event("message_start", {"message": start})
                    yield named_event("ping", {})
                for delta in chunk.all_deltas():
                    for piece in blocks.add(delta):
                        yield piece
                if chunk.finish_reason is not None:
                    for piece in blocks.close():
                        yield piece
                    stop = _stop(chunk, has_calls=blocks.has_calls)
                    yield named_event("message_delta", {"delta": stop, "usage": usage.shown()})
        yield named_event("message_stop", {})

    async def _job(self) -> GenerationRequest:
        (job,) = await self._chat.jobs()
        return within_context(job, self._model)

    def _message(self, blocks: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model.name,
            "content": blocks,
            **stop,
            "usage": usage,
        }


class _Blocks:
    """The events of the content blocks: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None
        self.has_calls = False

    def add(self, delta: MessageDelta) -> Iterable[bytes]:
        """The events of one delta."""
        match delta:
            case ContentDelta(text):
                yield from self._enter("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case ReasoningDelta(text):
                yield from self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallDelta(_, call_id, name):
                self.has_calls = True
                yield from self.close()
                yield from self._enter("tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case ArgumentsDelta(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def close(self) -> Iterable[bytes]:
        """The end of the open block."""
        if self._open is not None:
            if self._open == "thinking":
                yield self._delta({"type": "signature_delta", "signature": _signature()})
            self._open = None
            yield named_event("content_block_stop", {"index": self._index})

    def _enter(self, kind: str, block: dict[str, Any]) -> Iterable[bytes]:
        if self._open != kind:
            yield from self.close()
            self._open = kind
            self._index += 1
            yield named_event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, str]) -> bytes:
        return named_event("content_block_delta", {"index": self._index, "delta": delta})


class _Usage:
    def __init__(self) -> None:
        self._prompt = self._cached = self._output = 0

    def add(self, chunk: GenerationChunk) -> bool:
        """Count a chunk; True for the first one, which knows the prompt."""
        self._output += len(chunk.token_ids)
        if chunk.num_prompt_tokens is None:
            return False
        self._prompt, self._cached = chunk.num_prompt_tokens, chunk.num_cached_tokens or 0
        return True

    def shown(self) -> dict[str, int]:
        return _usage_of(self._prompt, self._cached, self._output)


def _usage(result: CompletionOutput) -> dict[str, int]:
    return _usage_of(result.num_prompt_tokens, result.num_cached_tokens, len(result.token_ids))


def _usage_of(prompt: int, cached: int, output: int) -> dict[str, int]:
    """Anthropic counts the tokens that were found in the cache apart from the others."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }


def _stop(part: CompletionOutput | GenerationChunk, *, has_calls: bool) -> dict[str, Any]:
    if part.finish_reason is not FinishReason.STOP:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if has_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(part.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": part.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _signature() -> str:
    """Clients send it back with the reasoning; nothing is signed here."""
    return uuid.uuid4().hex
