"""Ollama's requests as the requests that this server has: chats, and completions of raw prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.serving.ollama.types import OllamaChatRequest, OllamaGenerateRequest, OllamaRequest
from pagoda.serving.openai.requests import parse_request
from pagoda.serving.openai.types import ChatCompletionRequest, CompletionRequest

_ROLES = ("system", "user", "assistant", "tool")
_EFFORTS = {"max": "xhigh"}
_SAME = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "stop")
# Samplers that are not there, and the values that switch them off.
_OFF = {"typical_p": 1, "tfs_z": 1, "mirostat": 0}


def is_empty(request: OllamaRequest) -> bool:
    """Whether the request only asks that the model be loaded, or unloaded. Raises `NotSupportedError` for the latter."""
    content: object = request.messages if isinstance(request, OllamaChatRequest) else None
    if isinstance(request, OllamaGenerateRequest):
        content = request.prompt
    if content:
        return False
    if request.keep_alive is not None and str(request.keep_alive).rstrip("hms") in ("0", "0.0"):
        raise NotSupportedError("unloading is not supported: the model lives as long as the server", "keep_alive")
    return True


def chat_request(request: OllamaChatRequest) -> ChatCompletionRequest:
    """The chat that `request` is. Raises `InvalidRequestError` or `NotSupportedError`."""
    body: dict[str, Any] = {"messages": list(_messages(request.messages or [])), **_common(request)}
    if request.tools:
        body["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
    return parse_request(ChatCompletionRequest, body)


def generate_chat_request(request: OllamaGenerateRequest) -> ChatCompletionRequest:
    """The chat of one message that a prompt is. Raises `InvalidRequestError` or `NotSupportedError`."""
    messages = [{"role": "system", "content": request.system}] if request.system else []
    messages.append({"role": "user", "content": request.prompt or ""})
    return parse_request(ChatCompletionRequest, {"messages": messages, **_common(request)})


def completion_request(request: OllamaGenerateRequest) -> CompletionRequest:
    """The completion that a raw prompt is. Raises `InvalidRequestError` or `NotSupportedError`."""
    if request.system:
        raise InvalidRequestError("system needs a chat template, and raw goes without one", "system")
    fields = _common(request)
    for name in ("enable_thinking", "reasoning_effort"):
        fields.pop(name, None)
    if fields.pop("logprobs", None):
        fields["logprobs"] = fields.pop("top_logprobs", None) or 0
    return parse_request(CompletionRequest, {"prompt": request.prompt or "", **fields})


def check_supported(request: OllamaGenerateRequest) -> None:
    """Raise `NotSupportedError` for what this server does not have."""
    for name in ("suffix", "template", "images"):
        if getattr(request, name):
            raise NotSupportedError(f"{name} is not supported by this server", name)


def _common(request: OllamaRequest) -> dict[str, Any]:
    return {**_sampling(request), **_form(request), **_thinking(request), **_logprobs(request)}


def _sampling(request: OllamaRequest) -> dict[str, Any]:
    options = request.options
    if options is None:
        return {}
    for name, off in _OFF.items():
        if getattr(options, name) not in (None, off):
            raise NotSupportedError(f"options.{name}={getattr(options, name)} is not supported", f"options.{name}")
    fields = {name: value for name in _SAME if (value := getattr(options, name)) is not None}
    if options.num_predict is not None and options.num_predict > 0:
        fields["max_tokens"] = options.num_predict
    if options.repeat_penalty is not None and options.repeat_last_n != 0:
        fields["repetition_penalty"] = options.repeat_penalty
    if options.seed is not None and options.seed != -1:
        fields["seed"] = options.seed
    return fields


def _form(request: OllamaRequest) -> dict[str, Any]:
    form = request.format
    if not form:
        return {}
    if form == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(form, dict):
        raise InvalidRequestError(f"format must be json or a JSON schema, got {shown(form)}", "format")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}}


def _thinking(request: OllamaRequest) -> dict[str, Any]:
    if request.think is None or isinstance(request.think, bool):
        return {} if request.think is None else {"enable_thinking": request.think}
    return {"reasoning_effort": _EFFORTS.get(request.think, request.think)}


def _logprobs(request: OllamaRequest) -> dict[str, Any]:
    if not request.logprobs:
        return {}
    return {"logprobs": True, "top_logprobs": request.top_logprobs or 0}


def _messages(messages: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """OpenAI's messages. Its calls have ids, to which results refer: here results follow their calls in order."""
    num_calls = num_results = 0
    for message in messages:
        role = message["role"]
        if role not in _ROLES:
            raise InvalidRequestError(f"a message's role must be one of {', '.join(_ROLES)}", "messages")
        if message.get("images"):
            raise NotSupportedError("images are not supported; only text is", "images")
        made: dict[str, Any] = {"role": role, "content": message.get("content") or ""}
        if thinking := message.get("thinking"):
            made["reasoning"] = thinking
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": call["function"].get("arguments") or {},
                    },
                }
                for number, call in enumerate(calls, start=num_calls)
            ]
            num_calls += len(calls)
        if role == "tool":
            made["tool_call_id"] = f"call_{num_results}"
            num_results += 1
            if name := message.get("tool_name"):
                made["name"] = name
        yield made
