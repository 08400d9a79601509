"""Streamed events as the vendors' own packages know them: their types, their order, and what their helpers add up to."""

from __future__ import annotations

import json
from typing import Any

import httpx
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from openai import omit
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

_RESPONSE_EVENTS = TypeAdapter[Any](ResponseStreamEvent)
_MESSAGE_EVENTS = TypeAdapter[Any](RawMessageStreamEvent)
# What is sent beyond the packages' types: what OpenAI sends, too, and what clients of vLLM and SGLang read.
_BEYOND = {
    "Response": {"store"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
    "ResponseCustomToolCall": {"status"},
    "Choice": {"stop_reason"},
    "ChoiceDelta": {"reasoning", "reasoning_content"},
    "ChatCompletionMessage": {"reasoning", "reasoning_content"},
}
_ENDS = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}


def chat_stream(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The completion that OpenAI's helper adds up from a stream of chunks, each of OpenAI's type."""
    state = ChatCompletionStreamState()
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [_typed(ChatCompletionChunk.model_validate(json.loads(line), strict=True)) for line in lines]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    finished: set[int] = set()
    begun: set[int] = set()
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in finished
            assert (choice.delta.role == "assistant") == (choice.index not in begun)
            begun.add(choice.index)
            if choice.finish_reason is not None:
                finished.add(choice.index)
        state.handle_chunk(chunk)
    assert begun == finished
    return state.current_completion_snapshot.model_dump()


def checked_chat(content: Any) -> ChatCompletion:
    """A whole completion of OpenAI's type."""
    completion = ChatCompletion.model_validate(content, strict=True)
    _typed(completion)
    return completion


def response_stream(client: httpx.Client, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a Responses stream, each of OpenAI's types and in OpenAI's order; and the response in the last one."""
    events = _named_events(client, "/v1/responses", body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state = ResponseStreamState[Any](input_tools=omit, text_format=omit)
    for event in events:
        state.handle_event(_typed(_RESPONSE_EVENTS.validate_python(event, strict=True)))
    names = [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    last = events[-1]
    assert last["response"]["status"] == _ENDS[last["type"]]
    assert not {*names[:-1]} & {*_ENDS}
    items = _response_items(events[2:-1], is_cut=last["type"] == "response.failed")
    if last["type"] != "response.failed":
        assert items == last["response"]["output"]
    assert len({event["response"]["id"] for event in (*events[:2], last)}) == 1
    return events, last["response"]


def checked_response(content: Any) -> Response:
    """A whole response of OpenAI's type."""
    response = Response.model_validate(content, strict=True)
    _typed(response)
    return response


def _response_items(events: list[dict[str, Any]], *, is_cut: bool) -> list[dict[str, Any]]:
    """The items that the events make. Each is opened, told, and closed before the next; deltas joined are what is done."""
    items: list[dict[str, Any]] = []
    remaining = iter(events)
    for added in remaining:
        assert (added["type"], added["output_index"]) == ("response.output_item.added", len(items))
        kind, item_id = added["item"]["type"], added["item"]["id"]
        texts: dict[str, list[str]] = {}
        names: list[str] = []
        for event in remaining:
            name = event["type"].removeprefix("response.")
            assert event["output_index"] == len(items)
            if name == "output_item.done":
                break
            assert event["item_id"] == item_id
            names.append(name)
            if name.endswith(".delta"):
                texts.setdefault(name.removesuffix(".delta"), []).append(event["delta"])
                assert event["delta"]
            elif name.endswith("_part.done"):
                assert event["part"]["text"] == "".join(*texts.values())
            elif name.endswith(".done"):
                told = next(event[key] for key in ("text", "arguments", "input") if key in event)
                assert told == "".join(*texts.values())
        else:
            assert is_cut
            return items
        item = event["item"]
        assert (item["id"], item["type"]) == (item_id, kind)
        if kind in ("message", "reasoning"):
            text = "output_text" if kind == "message" else "reasoning_text"
            num_deltas = len(names) - 3
            assert names == [
                "content_part.added",
                *[f"{text}.delta"] * num_deltas,
                f"{text}.done",
                "content_part.done",
            ]
            assert [part["text"] for part in item["content"]] == ["".join(texts[text])]
        else:
            told_name = "custom_tool_call_input" if kind == "custom_tool_call" else "function_call_arguments"
            assert names == [*[f"{told_name}.delta"] * (len(names) - 1), f"{told_name}.done"]
            assert item["input" if kind == "custom_tool_call" else "arguments"] == "".join(texts.get(told_name, []))
        items.append(item)
    return items


def message_stream(client: httpx.Client, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a Messages stream, each of Anthropic's types and in Anthropic's order; and what its helper adds up."""
    events = _named_events(client, "/v1/messages", body)
    is_cut = events[-1]["type"] == "error"
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] in ("ping", "error"):  # the package takes them out before its types are asked
            continue
        typed = _typed(_MESSAGE_EVENTS.validate_python(event, strict=True))
        snapshot = accumulate_event(event=typed, current_snapshot=snapshot, json_bufs=buffers)
    names = [event["type"] for event in events if event["type"] != "ping"]
    assert names[0] == "message_start"
    if not is_cut:
        assert names[-2:] == ["message_delta", "message_stop"]
    open_block, num_blocks, kinds = None, 0, []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert (open_block, event["index"]) == (None, num_blocks)
                open_block, num_blocks = event["content_block"]["type"], num_blocks + 1
                kinds = []
            case "content_block_delta":
                assert event["index"] == num_blocks - 1
                kinds.append(event["delta"]["type"])
            case "content_block_stop":
                assert event["index"] == num_blocks - 1
                expected = {"text": "text_delta", "tool_use": "input_json_delta", "thinking": "thinking_delta"}
                if open_block == "thinking":
                    assert kinds.pop() == "signature_delta"
                assert set(kinds) <= {expected[open_block or ""]}
                open_block = None
            case "message_delta" | "message_stop":
                assert open_block is None
    return events, snapshot.model_dump()


def checked_message(content: Any) -> Message:
    """A whole message of Anthropic's type."""
    message = Message.model_validate(content, strict=True)
    _typed(message)
    return message


def _named_events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200, lines
    events = [json.loads(data.removeprefix("data: ")) for data in lines[1::2]]
    assert lines[::2] == [f"event: {event['type']}" for event in events]
    return events


def _typed(value: Any) -> Any:
    """`value`, in which every member is one that its type has."""
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or ()) - _BEYOND.get(type(value).__name__, set())
        assert not unknown, (type(value).__name__, unknown)
        for name in type(value).model_fields:
            _typed(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            _typed(each)
    return value
