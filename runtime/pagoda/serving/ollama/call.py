"""A request of /api/chat or /api/generate, from checked to its answer: one object, or one a line.

{…, "done": false}…  {…, "done": true, "done_reason": …, counts and times in nanoseconds}
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pagoda.errors import ContextLengthError
from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.serving.http.event_stream import Events, json_line
from pagoda.serving.json_values import arguments_object
from pagoda.serving.models import ServedModel
from pagoda.serving.ollama.requests import (
    chat_request,
    check_supported,
    completion_request,
    generate_chat_request,
)
from pagoda.serving.ollama.types import OllamaChatRequest, OllamaGenerateRequest
from pagoda.serving.openai.call import Call
from pagoda.serving.openai.chat import ChatCall, within_context
from pagoda.serving.openai.completions import CompletionCall
from pagoda.serving.openai.logprobs import chat_logprobs
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.responses.message import ArgumentsDelta, CallDelta, ContentDelta, ReasoningDelta, ToolCall


def now() -> str:
    """This moment, as Ollama writes it (RFC 3339)."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaAnswer:
    """A checked request; `whole` or `events` runs it, once."""

    def __init__(
        self, model: ServedModel, request: OllamaChatRequest | OllamaGenerateRequest, seconds: float | None
    ) -> None:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        self._served = model
        self._model = request.model or model.name
        self._started = time.monotonic_ns()
        self._earlier: list[int] = []
        self._is_chat = isinstance(request, OllamaChatRequest)
        self._call: Call
        if isinstance(request, OllamaChatRequest):
            self._call = ChatCall(model, chat_request(request), seconds)
            return
        check_supported(request)
        self._earlier = _earlier(model, request)
        has_template = bool(model.generator.pool.chat_template_sources)
        if request.raw or (not has_template and not request.system):
            self._call = CompletionCall(model, completion_request(request), seconds)
        else:
            self._call = ChatCall(model, generate_chat_request(request), seconds)

    async def whole(self) -> dict[str, Any]:
        """The answer when it is done; cancelling the call aborts it in the engine."""
        result, first = CompletionOutput(), 0
        async with aclosing(self._served.runner.stream(await self._job(), self._request_id())) as chunks:
            async for chunk in chunks:
                first = first or time.monotonic_ns()
                result.add(chunk)
        message = result.message
        shown = self._shown(message.content, message.reasoning or "", message.tool_calls)
        if result.logprobs:
            shown["logprobs"] = _logprobs(result)
        return {**shown, **self._end(result, first)}

    async def events(self) -> Events:
        """The answer in lines; closing the iterator aborts it in the engine."""
        result, first = CompletionOutput(), 0
        calls = _Calls()
        async with aclosing(self._served.runner.stream(await self._job(), self._request_id())) as chunks:
            async for chunk in chunks:
                first = first or time.monotonic_ns()
                result.add(chunk)
                for shown in self._pieces(chunk, calls):
                    yield json_line({**shown, "done": False})
                if chunk.finish_reason is not None:
                    yield json_line({**self._shown("", "", []), **self._end(result, first)})

    def _request_id(self) -> str:
        return f"ollama-{uuid.uuid4().hex}"

    async def _job(self) -> GenerationRequest:
        (job,) = await self._call.jobs()
        if isinstance(job.prompt, str):
            pool = self._served.generator.pool
            job = replace(job, prompt=await pool.encode(job.prompt, add_special_tokens=not self._earlier))
        if self._earlier:
            job = replace(job, prompt=[*self._earlier, *job.prompt])
        return within_context(job, self._served)

    def _pieces(self, chunk: GenerationChunk, calls: _Calls) -> Iterable[dict[str, Any]]:
        """What is new in a chunk. A call is shown when its arguments are whole."""
        pieces = []
        for delta in chunk.all_deltas():
            match delta:
                case ContentDelta(text):
                    pieces.append(self._shown(text, "", []))
                case ReasoningDelta(text):
                    pieces.append(self._shown("", text, []))
                case CallDelta() | ArgumentsDelta():
                    pieces += [self._shown("", "", [call]) for call in calls.add(delta)]
        if chunk.finish_reason is not None:
            pieces += [self._shown("", "", [call]) for call in calls.end()]
        if chunk.logprobs:
            pieces = pieces or [self._shown("", "", [])]
            pieces[0]["logprobs"] = _logprobs(chunk)
        return pieces

    def _shown(self, content: str, thinking: str, calls: Iterable[ToolCall]) -> dict[str, Any]:
        """The members of a piece or of a whole answer that hold text."""
        members: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if not self._is_chat:
            return {"model": self._model, "created_at": now(), "response": content, **members}
        shown_calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": arguments_object(call.arguments)}}
            for call in calls
        ]
        if shown_calls:
            members["tool_calls"] = shown_calls
        message = {"role": "assistant", "content": content, **members}
        return {"model": self._model, "created_at": now(), "message": message}

    def _end(self, result: CompletionOutput, first: int) -> dict[str, Any]:
        """The members of the end. `first`: when the first token came; the prompt was evaluated up to there."""
        ended = time.monotonic_ns()
        first = first or ended
        end = {
            "done": True,
            "done_reason": "stop" if result.finish_reason is FinishReason.STOP else "length",
            "total_duration": ended - self._started,
            "load_duration": 0,
            "prompt_eval_count": result.num_prompt_tokens,
            "prompt_eval_duration": first - self._started,
            "eval_count": len(result.token_ids),
            "eval_duration": ended - first,
        }
        return end if self._is_chat else {**end, "context": [*result.prompt_token_ids, *result.token_ids]}


def _earlier(model: ServedModel, request: OllamaGenerateRequest) -> list[int]:
    """The tokens that stand before the prompt. Raises `ContextLengthError` for more than there may be of them."""
    ready, ids = model.ready, request.context or ()
    if ready is not None and len(ids) >= ready.max_model_len:
        raise ContextLengthError(f"context alone has {len(ids)} tokens", "context", ready.max_model_len)
    return list(ids)


class _Calls:
    """Tool calls of a stream, each until its arguments are whole: the next one begins, or the answer ends."""

    def __init__(self) -> None:
        self._open: ToolCall | None = None

    def add(self, delta: CallDelta | ArgumentsDelta) -> list[ToolCall]:
        """The calls that `delta` ends."""
        if isinstance(delta, CallDelta):
            ended = self.end()
            self._open = ToolCall(delta.name, delta.id)
            return ended
        if self._open is not None:
            self._open.arguments += delta.text
        return []

    def end(self) -> list[ToolCall]:
        """The call that is still open."""
        ended, self._open = self._open, None
        return [] if ended is None else [ended]


def _logprobs(part: CompletionOutput | GenerationChunk) -> Any:
    return chat_logprobs(part.logprobs or [])["content"]
