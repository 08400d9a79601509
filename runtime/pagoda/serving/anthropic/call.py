"""A request of /v1/messages, from checked to its message: whole, or in Anthropic's events.

    message_start  ping  (content_block_start  content_block_delta…  content_block_stop)…  message_delta  message_stop

Blocks follow one another: reasoning is a block of type thinking, content one of type text, each call one of type tool_use.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias

from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.serving.anthropic.requests import chat_request
from pagoda.serving.anthropic.types import MessagesRequest
from pagoda.serving.http.event_stream import Events, named_event
from pagoda.serving.json_values import arguments_object
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.chat import ChatCall, within_context
from pagoda.text.output import GenerationChunk
from pagoda.text.responses.message import ArgumentsDelta, CallDelta, ContentDelta, MessageDelta, ReasoningDelta

Event: TypeAlias = tuple[str, dict[str, Any]]
"""Its name, and its members but for the type."""


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
        blocks = _Blocks()
        message: dict[str, Any] = {}
        async with aclosing(self._run(blocks)) as events:
            async for _, members in events:
                message = members.get("message", message)
                if "delta" in members and "usage" in members:
                    message |= {**members["delta"], "usage": members["usage"]}
        return {**message, "content": blocks.whole()}

    async def events(self) -> Events:
        """The message in events; closing the iterator aborts it in the engine."""
        async with aclosing(self._run(_Blocks())) as events:
            async for name, members in events:
                yield named_event(name, members)

    async def _run(self, blocks: _Blocks) -> AsyncGenerator[Event, None]:
        job, max_tokens = await self._job()
        usage = _Usage()
        async with aclosing(self._model.runner.stream(job, self._message_id)) as chunks:
            async for chunk in chunks:
                if usage.add(chunk):
                    yield "message_start", {"message": self._message(usage.shown())}
                    yield "ping", {}
                for delta in chunk.all_deltas():
                    for event in blocks.add(delta):
                        yield event
                if chunk.finish_reason is not None:
                    for event in blocks.close():
                        yield event
                    is_cut = job.params.max_tokens != max_tokens
                    stop = _stop(chunk, has_calls=blocks.has_calls, is_cut=is_cut)
                    yield "message_delta", {"delta": stop, "usage": usage.shown()}
        yield "message_stop", {}

    async def _job(self) -> tuple[GenerationRequest, int | None]:
        """The job, and the bound that the client gave, of which the job has what fits the context."""
        (job,) = await self._chat.jobs()
        return within_context(job, self._model), job.params.max_tokens

    def _message(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The message before anything is said."""
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


class _Blocks:
    """The events of the content blocks, of which one is open at a time; and the blocks that they make."""

    def __init__(self) -> None:
        self._blocks: list[tuple[dict[str, Any], list[str]]] = []
        self._open: str | None = None
        self.has_calls = False

    def add(self, delta: MessageDelta) -> Iterable[Event]:
        """The events of one delta."""
        match delta:
            case ContentDelta(text):
                yield from self._enter("text", {"type": "text", "text": ""})
                yield self._delta("text_delta", "text", text)
            case ReasoningDelta(text):
                yield from self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta("thinking_delta", "thinking", text)
            case CallDelta(_, call_id, name):
                self.has_calls = True
                yield from self.close()
                yield from self._enter("tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case ArgumentsDelta(_, text):
                yield self._delta("input_json_delta", "partial_json", text)

    def close(self) -> Iterable[Event]:
        """The end of the open block."""
        if self._open is not None:
            if self._open == "thinking":
                signature = _signature()
                self._blocks[-1][0]["signature"] = signature
                yield self._event("content_block_delta", delta={"type": "signature_delta", "signature": signature})
            self._open = None
            yield self._event("content_block_stop")

    def whole(self) -> list[dict[str, Any]]:
        """The blocks, as clients make them of the events."""
        whole = []
        for block, pieces in self._blocks:
            text, kind = "".join(pieces), block["type"]
            whole.append({**block, **({"input": arguments_object(text)} if kind == "tool_use" else {kind: text})})
        return whole

    def _enter(self, kind: str, block: dict[str, Any]) -> Iterable[Event]:
        if self._open != kind:
            yield from self.close()
            self._open = kind
            self._blocks.append((block, []))
            yield self._event("content_block_start", content_block=dict(block))

    def _delta(self, kind: str, member: str, text: str) -> Event:
        self._blocks[-1][1].append(text)
        return self._event("content_block_delta", delta={"type": kind, member: text})

    def _event(self, name: str, **members: Any) -> Event:
        return name, {"index": len(self._blocks) - 1, **members}


class _Usage:
    """Anthropic counts the tokens that were found in the cache apart from the others."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._output = self._thinking = 0

    def add(self, chunk: GenerationChunk) -> bool:
        """Count a chunk; True for the first one, which knows the prompt."""
        self._output += len(chunk.token_ids)
        self._thinking += chunk.num_reasoning_tokens
        if chunk.num_prompt_tokens is None:
            return False
        self._prompt, self._cached = chunk.num_prompt_tokens, chunk.num_cached_tokens or 0
        return True

    def shown(self) -> dict[str, Any]:
        return {
            "input_tokens": self._prompt - self._cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": self._output,
            "output_tokens_details": {"thinking_tokens": self._thinking},
        }


def _stop(part: GenerationChunk, *, has_calls: bool, is_cut: bool) -> dict[str, Any]:
    """Why the message ends. `is_cut`: the context has less room than the client's bound."""
    if part.finish_reason is not FinishReason.STOP:
        reason = "model_context_window_exceeded" if is_cut else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}
    if has_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(part.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": part.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _signature() -> str:
    """Clients send it back with the reasoning; nothing is signed here."""
    return uuid.uuid4().hex
