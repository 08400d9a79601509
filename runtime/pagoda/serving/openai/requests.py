"""OpenAI request bodies to types, sampling and options; what this server does not have is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.serving.json_values import shown
from pagoda.serving.openai.types import Message, RequestModel, SamplingFields
from pagoda.serving.parameters import FIELDS, MakeSampling, parse_parameters

logger = logging.getLogger(__name__)

Request = TypeVar("Request", bound=RequestModel)

MAX_NAMES_LOGGED = 100
PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _is_other_than(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value is not None and value not in allowed


# Fields whose effect this server does not have, and the values that ask for it: they are refused and not ignored.
UNSUPPORTED: dict[str, Callable[[object], bool]] = {
    "functions": _is_given,
    "function_call": _is_other_than("none", "auto"),
    "audio": _is_given,
    "modalities": _is_other_than(["text"]),
    "web_search_options": _is_given,
    "best_of": _is_other_than(1),
    "suffix": _is_given,
    "use_beam_search": _is_given,
    "structured_outputs": _is_given,
    "guided_json": _is_given,
    "guided_regex": _is_given,
    "guided_choice": _is_given,
    "guided_grammar": _is_given,
    "prompt_embeds": _is_given,
    "truncate_prompt_tokens": _is_given,
    "logits_processors": _is_given,
    "chat_template": _is_given,
    "documents": _is_given,
    "thinking_token_budget": _is_given,
    # Of conversations only.
    "tools": _is_given,
    "tool_choice": _is_other_than("none", "auto"),
}
# Known fields that are accepted and change nothing.
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "verbosity", "request_id"),
    }
)
_logged_names: set[str] = set()


def parse_request(kind: type[Request], content: Mapping[str, Any]) -> Request:
    """The typed request; raises `InvalidRequestError` or `NotSupportedError`."""
    for name, matters in UNSUPPORTED.items():
        if name in content and name not in kind.model_fields and matters(content[name]):
            raise NotSupportedError(f"{name}={shown(content[name])} is not supported by this server")
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        raise _invalid(error) from None
    _log_unknown(set(request.model_extra or ()) - WITHOUT_EFFECT - set(UNSUPPORTED))
    return request


def generation_request(
    request: SamplingFields, make_sampling: MakeSampling, overrides: Mapping[str, Any]
) -> GenerationRequest:
    """What the given fields ask for, but for the prompt; `overrides` replace or add fields, None removes one."""
    given = request.model_dump(exclude_none=True, include=set(FIELDS) & set(type(request).model_fields))
    return parse_parameters({**given, **overrides}, make_sampling)


def check_stream_options(request: SamplingFields) -> None:
    """`stream_options` mean something for a stream only."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options is allowed only with stream: true", "stream_options")


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them; only text can be understood here.

    Arguments of calls, which the protocol has as JSON text, become the objects that templates print, each in its own form.
    """
    for message in messages:
        if not isinstance(message.content, list):
            continue
        for part in message.content:
            if part.get("type") != "text":
                raise NotSupportedError(f"content of type {shown(part.get('type'))} is not supported; only text is")
            if not isinstance(part.get("text"), str):
                raise InvalidRequestError("a content part of type text needs a string in text", "messages")
    plain = [message.model_dump(exclude_none=True) for message in messages]
    for message_ in plain:
        for call in message_.get("tool_calls") or ():
            call["function"]["arguments"] = _arguments_object(call["function"].get("arguments"))
            call.setdefault("type", "function")
        if message_.get("tool_calls"):
            message_.setdefault("content", "")
    return plain


def _arguments_object(arguments: str | dict[str, Any] | None) -> Any:
    """An object; text that is none, as that of a call that was cut off, stays text."""
    if not isinstance(arguments, str):
        return arguments or {}
    if not arguments.strip():
        return {}
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _invalid(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if field == "prompt" and first["type"] != "missing":
        return InvalidRequestError(f"prompt must be {PROMPT_FORMS}", "prompt")
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return InvalidRequestError(f"{where[:200]}: {first['msg'][:300]}", field)


def _log_unknown(names: set[str]) -> None:
    """Say once for each name that it is ignored; the set of names is bounded, clients choose them."""
    for name in sorted(names - _logged_names):
        if len(_logged_names) >= MAX_NAMES_LOGGED:
            return
        _logged_names.add(name)
        logger.warning("unknown request field %s is ignored (said once)", shown(name))
