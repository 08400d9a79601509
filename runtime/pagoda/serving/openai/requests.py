"""OpenAI request bodies to types, sampling and options; what this server does not have is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.request import GenerationRequest
from pagoda.serving import json_decoding
from pagoda.serving.openai.types import RequestModel, SamplingFields
from pagoda.serving.openai.validators import first_error
from pagoda.serving.parameters import FIELDS, MakeSampling, parse_parameters

logger = logging.getLogger(__name__)

Request = TypeVar("Request", bound=RequestModel)
Body = TypeVar("Body", bound=BaseModel)

MAX_NAMES_LOGGED = 100


def _is_given(value: object) -> bool:
    return value is not None and value is not False and (not isinstance(value, Sized) or len(value) > 0)


def _is_other_than(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value is not None and value not in allowed


# Others' names of fields that this server has, and its own.
_OWN_NAMES = {
    **dict.fromkeys(("max_new_tokens", "max_length", "n_predict", "num_predict"), "max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "min_tokens"),
    **{"repeat_penalty": "repetition_penalty", "n_probs": "logprobs", "lora_path": "model", "extra_key": "cache_salt"},
    **{"no_stop_trim": "include_stop_str_in_output", "random_seed": "seed", "stop_words": "stop"},
}
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
    "prompt_embeds": _is_given,
    "truncate_prompt_tokens": _is_given,
    "logits_processors": _is_given,
    "chat_template": _is_given,
    "documents": _is_given,
    "thinking_token_budget": _is_given,
    # Of conversations only.
    "tools": _is_given,
    "tool_choice": _is_other_than("none", "auto"),
    # Of completions only; vLLM's chats repeat a message that is continued.
    "echo": _is_given,
    # vLLM's.
    **dict.fromkeys(("return_prompt_text", "logprob_token_ids", "watermarking"), _is_given),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection"), _is_given),
    # SGLang's.
    **dict.fromkeys(("stop_regex", "custom_logit_processor", "custom_params", "session_params"), _is_given),
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "bootstrap_host"), _is_given),
    "separate_reasoning": _is_other_than(True),
    # Samplers of llama.cpp, text-generation-webui and transformers.
    **dict.fromkeys(("typical_p", "typical", "tfs", "tfs_z", "encoder_repetition_penalty"), _is_other_than(1)),
    **dict.fromkeys(("num_beams", "beam_width", "do_sample"), _is_other_than(1)),
    **dict.fromkeys(
        ("top_a", "mirostat", "mirostat_mode", "no_repeat_ngram_size", "dynatemp_range"), _is_other_than(0)
    ),
    **dict.fromkeys(("dry_multiplier", "xtc_probability", "smoothing_factor"), _is_other_than(0)),
    "top_n_sigma": lambda value: isinstance(value, int | float) and value > 0,
    "samplers": _is_given,
    **dict.fromkeys(_OWN_NAMES, _is_given),
}
# Known fields that are accepted and change nothing.
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "verbosity", "request_id", "client_metadata", "context_management"),
        # Of vLLM and SGLang: they change nothing there either, without beams, images or slow tokenizers; or only speed.
        *("length_penalty", "early_stopping", "spaces_between_special_tokens", "truncation_side", "stream_interval"),
        *("media_io_kwargs", "mm_processor_kwargs", "session_id", "rid", "stream_reasoning", "cache_prompt"),
    }
)
_logged_names: set[str] = set()

_THINKING = "thinking"
# Types of parts that hold text, and the field that holds it.
_TEXT_FIELDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
    _THINKING: _THINKING,
}


def parsed(kind: type[Body], content: Mapping[str, Any]) -> Body:
    """A typed body that asks for no model; unknown fields are left out. Raises `InvalidRequestError`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _invalid(error) from None


def parse_request(kind: type[Request], content: Mapping[str, Any]) -> Request:
    """The typed request; raises `InvalidRequestError` or `NotSupportedError`."""
    for name, matters in UNSUPPORTED.items():
        if name in content and name not in kind.model_fields and matters(content[name]):
            hint = f"; its name is {_OWN_NAMES[name]}" if name in _OWN_NAMES else ""
            raise NotSupportedError(f"{name}={shown(content[name])} is not supported by this server{hint}", name)
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
    given = {name: getattr(request, name) for name in type(request).model_fields if name in FIELDS}
    return parse_parameters({**given, **overrides}, make_sampling)


def check_stream_options(request: SamplingFields) -> None:
    """`stream_options` mean something for a stream only."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options is allowed only with stream: true", "stream_options")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them; only text can be understood here.

    Parts that hold text in another form (a refusal, those of Responses) become parts of type text, and `thinking` of an
    assistant its reasoning. Arguments of calls, which the protocol has as JSON text, become the objects that templates
    print, each in its own form.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = _without_none(message)
    if isinstance(content := plain.get("content"), list):
        parts = [_text_part(part) for part in content]
        plain["content"] = [{"type": "text", "text": text} for kind, text in parts if kind != _THINKING]
        if thinking := "".join(text for kind, text in parts if kind == _THINKING):
            plain.setdefault("reasoning_content", thinking)
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_template_call(call) for call in calls]
        plain.setdefault("content", "")
    return plain


def _text_part(part: Mapping[str, Any] | str) -> tuple[str, str]:
    """The type and the text of a part."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type")
    if kind not in _TEXT_FIELDS:
        raise NotSupportedError(
            f"content of type {shown(kind)} is not supported; only text is: {', '.join(_TEXT_FIELDS)}", "messages"
        )
    text = part.get(_TEXT_FIELDS[kind])
    if not isinstance(text, str):
        raise InvalidRequestError(f"a content part of type {kind} needs a string in {_TEXT_FIELDS[kind]}", "messages")
    return kind, text


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = _without_none(call["function"])
    return {
        "type": "function",
        **_without_none(call),
        "function": {**function, "arguments": _arguments_object(function.get("arguments"))},
    }


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}


def _arguments_object(arguments: str | dict[str, Any] | None) -> Any:
    """An object; text that is none, as that of a call that was cut off, stays text."""
    if not isinstance(arguments, str):
        return arguments or {}
    if not arguments.strip():
        return {}
    try:
        parsed = json_decoding.loads(arguments.encode())
    except orjson.JSONDecodeError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _invalid(error: ValidationError) -> InvalidRequestError:
    where, what = first_error(error)
    return InvalidRequestError(f"{where or 'the body'}: {what}", where.partition(".")[0] or None)


def _log_unknown(names: set[str]) -> None:
    """Say once for each name that it is ignored; the set of names is bounded, clients choose them."""
    for name in names - _logged_names:
        if len(_logged_names) >= MAX_NAMES_LOGGED:
            return
        _logged_names.add(name)
        logger.warning("unknown request field %s is ignored (said once)", shown(name))
