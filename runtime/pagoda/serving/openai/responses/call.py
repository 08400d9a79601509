"""A request of /v1/responses, from checked to its response: whole, or in OpenAI's events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pagoda.sampling.output import FinishReason
from pagoda.serving.http.event_stream import Events, named_event
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.chat import ChatCall, within_context
from pagoda.serving.openai.responses.output import Event, OutputItems, TextLogprobs
from pagoda.serving.openai.responses.requests import Message, chat_request
from pagoda.serving.openai.responses.store import TenantResponses
from pagoda.serving.openai.responses.types import ResponsesRequest
from pagoda.serving.openai.usage import UsageCounter
from pagoda.serving.status import ErrorReport
from pagoda.text.responses.message import AssistantMessage, MessageDelta


class ResponsesCall:
    """A checked request; `whole` or `events` runs it, once."""

    def __init__(
        self, model: ServedModel, request: ResponsesRequest, seconds: float | None, store: TenantResponses
    ) -> None:
        """Check everything that can be checked before the template is applied; `seconds` is the header's limit."""
        self._model = model
        self._request = request
        self._store = store
        previous = request.previous_response_id
        earlier: list[Message] = store.get(previous)[1] if previous is not None else []
        chat, self._messages, self._tools = chat_request(request, earlier)
        self._chat = ChatCall(model, chat, seconds)
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        """The response when it is done; cancelling the call aborts it in the engine."""
        response: dict[str, Any] = {}
        async with aclosing(self._run()) as events:
            async for _, members in events:
                response = members.get("response", response)
        return response

    async def events(self) -> Events:
        """The response in events; closing the iterator aborts it in the engine."""
        async with aclosing(self._run()) as events:
            async for name, members in events:
                yield self._encoded(name, members)

    def error_event(self, report: ErrorReport) -> bytes:
        """The last event of a stream that failed."""
        error = {"code": _ERROR_CODES.get(report.openai_type, "server_error"), "message": report.message}
        return self._encoded("response.failed", {"response": self._response("failed", [], None, error=error)})

    async def _run(self) -> AsyncGenerator[Event, None]:
        (job,) = await self._chat.jobs()
        job = within_context(job, self._model)
        items, usage = OutputItems(self._tools), UsageCounter(has_drafts=False)
        logprobs = TextLogprobs()
        deltas: list[MessageDelta] = []
        has_begun = False
        async with aclosing(self._model.runner.stream(job, self._id)) as chunks:
            async for chunk in chunks:
                if not has_begun:  # a refused request has an error's status, and no stream
                    has_begun = True
                    yield "response.created", {"response": self._response("in_progress", [], None)}
                    yield "response.in_progress", {"response": self._response("in_progress", [], None)}
                usage.add(0, chunk)
                logprobs.wait(chunk.logprobs or ())
                for delta in chunk.all_deltas():
                    deltas.append(delta)
                    for event in items.add(delta, logprobs.of(delta)):
                        yield event
                if chunk.finish_reason is None:
                    continue
                status = "completed" if chunk.finish_reason is FinishReason.STOP else "incomplete"
                for event in items.close(status):
                    yield event
                response = self._response(status, items.done, usage.usage())
                self._keep(response, AssistantMessage.of(deltas))
                yield f"response.{status}", {"response": response}

    def _keep(self, response: dict[str, Any], message: AssistantMessage) -> None:
        """Store the conversation, in case that the client goes on with it."""
        if self._request.store is False:
            return
        said: Message = {"role": "assistant", "content": message.content}
        if message.reasoning:
            said["reasoning"] = message.reasoning
        if message.tool_calls:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        self._store.put(response, [*self._messages, said])

    def _encoded(self, name: str, members: dict[str, Any]) -> bytes:
        self._num_events += 1
        return named_event(name, {"sequence_number": self._num_events - 1, **members})

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: dict[str, Any] | None,
        *,
        error: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        request = self._request
        text = request.text.model_dump(exclude_none=True) if request.text is not None else {}
        reasoning = request.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model.name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": request.store is not False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


_ERROR_CODES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    reasoning = usage.get("completion_tokens_details") or {"reasoning_tokens": 0}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
