"""The output items of a response, and the events in which they come.

output_item.added  content_part.added  output_text.delta…  output_text.done  content_part.done  output_item.done
output_item.added  content_part.added  reasoning_text.delta…  reasoning_text.done  content_part.done  output_item.done
output_item.added  function_call_arguments.delta…  function_call_arguments.done  output_item.done
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from pagoda.serving.openai.logprobs import chat_logprobs
from pagoda.serving.openai.responses.requests import ToolKind
from pagoda.text.output import PositionLogprobs
from pagoda.text.responses.message import ArgumentsDelta, CallDelta, ContentDelta, MessageDelta, ReasoningDelta

Event = tuple[str, dict[str, Any]]
"""Its name, and its members but for type and sequence number."""


class TextLogprobs:
    """Gives each delta the log-probabilities of its tokens. Tokens wait for the delta that has their text: what may be the
    beginning of a marker is held back, and markers are in no delta."""

    def __init__(self) -> None:
        self._waiting: list[PositionLogprobs] = []

    def wait(self, positions: Iterable[PositionLogprobs]) -> None:
        """More tokens, whose texts come in this delta or a later one."""
        self._waiting += positions

    def of(self, delta: MessageDelta) -> list[dict[str, Any]]:
        """Those of a delta's tokens, as Responses has them."""
        if isinstance(delta, CallDelta) or not self._waiting:
            return []
        begin, end, text = 0, 0, ""
        while end < len(self._waiting) and delta.text not in text:
            text += self._waiting[end].chosen.token
            end += 1
        while begin < end and delta.text in (rest := text[len(self._waiting[begin].chosen.token) :]):
            begin, text = begin + 1, rest
        own, self._waiting = self._waiting[begin:end], self._waiting[end:]
        content: list[dict[str, Any]] = chat_logprobs(own)["content"]
        return content


class OutputItems:
    """Items, of which one is open at a time; `done` has those that are whole. `tools`: what the chat's functions are."""

    def __init__(self, tools: Mapping[str, ToolKind]) -> None:
        self._tools = tools
        self._open: _TextItem | _CallItem | None = None
        self.done: list[dict[str, Any]] = []

    def add(self, delta: MessageDelta, logprobs: list[dict[str, Any]]) -> Iterable[Event]:
        """The events of one delta; `logprobs`: of its tokens, where they were asked for."""
        match delta:
            case ContentDelta(text) | ReasoningDelta(text):
                kind = "message" if isinstance(delta, ContentDelta) else "reasoning"
                if not isinstance(self._open, _TextItem) or self._open.kind != kind:
                    yield from self._enter(_TextItem(kind, len(self.done) + (self._open is not None)))
                yield from self._open.add(text, logprobs)  # type: ignore[call-arg, union-attr]
            case CallDelta(_, call_id, name):
                kind_of_tool = self._tools.get(name, ToolKind(name))
                yield from self._enter(_CallItem(kind_of_tool, call_id, len(self.done) + (self._open is not None)))
            case ArgumentsDelta(_, text):
                assert isinstance(self._open, _CallItem)
                yield from self._open.add(text)

    def close(self, status: str = "completed") -> Iterable[Event]:
        """The end of the open item."""
        item, self._open = self._open, None
        if item is not None:
            yield from item.close(status)
            self.done.append(item.shown(status))
            yield "response.output_item.done", {"output_index": item.index, "item": self.done[-1]}

    def _enter(self, item: _TextItem | _CallItem) -> Iterable[Event]:
        yield from self.close()
        self._open = item
        yield "response.output_item.added", {"output_index": item.index, "item": item.shown("in_progress")}
        yield from item.open()


class _TextItem:
    """A message of the assistant, or its reasoning."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self.index = index
        self._id = f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}"
        self._name = "response.output_text" if kind == "message" else "response.reasoning_text"
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def open(self) -> Iterable[Event]:
        yield "response.content_part.added", {**self._place(), "part": self._part("")}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterable[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        yield f"{self._name}.delta", {**self._place(), "delta": text, **self._with_logprobs(logprobs)}

    def close(self, status: str) -> Iterable[Event]:
        text = "".join(self._texts)
        yield f"{self._name}.done", {**self._place(), "text": text, **self._with_logprobs(self._logprobs)}
        yield "response.content_part.done", {**self._place(), "part": self._part(text)}

    def shown(self, status: str) -> dict[str, Any]:
        content = [self._part("".join(self._texts))] if status != "in_progress" else []
        item: dict[str, Any] = {"id": self._id, "type": self.kind, "status": status, "content": content}
        return (
            {**item, "role": "assistant"}
            if self.kind == "message"
            else {**item, "summary": [], "encrypted_content": None}
        )

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs if text else []}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self.index, "content_index": 0}

    def _with_logprobs(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self.kind == "message" else {}


class _CallItem:
    """A call of a function, or of a custom tool, whose input is one text."""

    def __init__(self, tool: ToolKind, call_id: str, index: int) -> None:
        self.index = index
        self._tool = tool
        self._call_id = call_id
        self._id = f"{'ctc' if tool.is_custom else 'fc'}_{uuid.uuid4().hex}"
        self._pieces: list[str] = []

    def open(self) -> Iterable[Event]:
        return ()

    def add(self, text: str) -> Iterable[Event]:
        self._pieces.append(text)
        if not self._tool.is_custom:  # its input is known when its arguments are whole
            yield "response.function_call_arguments.delta", {**self._place(), "delta": text}

    def close(self, status: str) -> Iterable[Event]:
        if self._tool.is_custom:
            yield "response.custom_tool_call_input.delta", {**self._place(), "delta": self._input()}
            yield "response.custom_tool_call_input.done", {**self._place(), "input": self._input()}
        else:
            done = {"name": self._tool.name, "arguments": "".join(self._pieces)}
            yield "response.function_call_arguments.done", {**self._place(), **done}

    def shown(self, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._id, "status": status, "call_id": self._call_id, "name": self._tool.name}
        if self._tool.namespace is not None:
            item["namespace"] = self._tool.namespace
        if self._tool.is_custom:
            return {**item, "type": "custom_tool_call", "input": self._input() if status != "in_progress" else ""}
        return {**item, "type": "function_call", "arguments": "".join(self._pieces)}

    def _input(self) -> str:
        arguments = "".join(self._pieces)
        try:
            value = json.loads(arguments)
        except ValueError:
            return arguments
        text = value.get("input") if isinstance(value, dict) else None
        return text if isinstance(text, str) else arguments

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self.index}
