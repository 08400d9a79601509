"""Sampling and request options given by name and value: the `parameters` of V2, checked against one table.

The same names work as request parameters, as members of a generate body and as tensors. A name that is not in the table is an
error: a misspelt `max_token` must not silently generate to the model's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import GenerationRequest, TokenIds
from pagoda.sampling.params import SamplingParams
from pagoda.serving import json_decoding
from pagoda.serving.structured_outputs import STRUCTURED_FIELDS, grammar_of

MAX_INTEGER = 2**31 - 1
MICROSECONDS = 1_000_000
TIMEOUT_HEADER = "x-request-timeout-seconds"
MAX_CACHE_SALT_CHARACTERS = 256
MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
MAX_PARAMETER_STRINGS = 256
MAX_PARAMETER_IDS = 2**19
"""Ids of a list such as allowed_token_ids; no vocabulary has more."""


def whole_number(value: object) -> object:
    """A float without a fraction, as some clients write every number, as the integer that it is; the rest as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_integer(name: str, value: object) -> int:
    """`value`, if it is an integer that fits 32 bits (`seed`: 64); 8.0 is one."""
    value = whole_number(value)
    limit = 2**63 - 1 if name == "seed" else MAX_INTEGER
    if isinstance(value, bool) or not isinstance(value, int) or not -limit - 1 <= value <= limit:
        raise InvalidRequestError(f"{name} must be an integer of at most {limit}, got {shown(value)}", name)
    return value


def as_number(name: str, value: object) -> float:
    """`value`, if it is a number; its range is checked by `SamplingParams`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name} must be a number, got {shown(value)}", name)
    return value


def as_boolean(name: str, value: object) -> bool:
    """`value`, if it is true or false."""
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be true or false, got {shown(value)}", name)
    return value


def as_string(name: str, value: object) -> str:
    """`value`, if it is a string."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, got {shown(value)}", name)
    return value


def as_strings(name: str, value: object) -> tuple[str, ...]:
    """A string (taken as one, never as JSON) or a list of strings."""
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_PARAMETER_STRINGS:
        raise InvalidRequestError(
            f"{name} has {len(values)} strings; at most {MAX_PARAMETER_STRINGS} are allowed", name
        )
    if not all(isinstance(item, str) for item in values):
        raise InvalidRequestError(f"{name} must be a string or a list of strings", name)
    return tuple(values)


def as_token_ids(name: str, value: object) -> tuple[int, ...]:
    """A token id, a list of token ids, or (where the protocol has only scalars) a JSON list in a string."""
    if isinstance(value, str):
        value = _from_json_text(name, value, "[13, 198]")
    values = value if isinstance(value, list | TokenIds) else [value]
    if len(values) > MAX_PARAMETER_IDS:
        raise InvalidRequestError(f"{name} has {len(values)} ids; at most {MAX_PARAMETER_IDS} are allowed", name)
    if isinstance(values, TokenIds):
        return tuple(np.unique(values.array).tolist())  # as a set they are meant
    return tuple(as_integer(name, item) for item in values)


def as_logit_bias(name: str, value: object) -> dict[int, float]:
    """A mapping of token id to bias; ids may be strings, as JSON keys are. A string is read as JSON."""
    if isinstance(value, str):
        value = _from_json_text(name, value, '{"13": -1.5}')
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, got {shown(value)}", name)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        digits = str(key)
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
            raise InvalidRequestError(f"{name}: {shown(key)} is not a token id", name)
        biases[as_integer(name, int(digits))] = as_number(name, bias)
    return biases


def _from_json_text(name: str, text: str, example: str) -> object:
    try:
        return json_decoding.loads(text.encode())
    except orjson.JSONDecodeError:
        raise InvalidRequestError(
            f"{name} as a string must be JSON such as {example}, got {shown(text)}", name
        ) from None


MakeSampling = Callable[[Mapping[str, Any]], SamplingParams]
"""Completes the fields that a client gave with the checkpoint's defaults."""

Converter = Callable[[str, Any], Any]
SAMPLING_FIELDS: dict[str, Converter] = {
    "n": as_integer,
    "max_tokens": as_integer,
    "min_tokens": as_integer,
    "temperature": as_number,
    "top_k": as_integer,
    "top_p": as_number,
    "min_p": as_number,
    "repetition_penalty": as_number,
    "presence_penalty": as_number,
    "frequency_penalty": as_number,
    "logit_bias": as_logit_bias,
    "bad_words": as_strings,
    "allowed_token_ids": as_token_ids,
    "ignore_eos": as_boolean,
    "stop": as_strings,
    "stop_token_ids": as_token_ids,
    "include_stop_str_in_output": as_boolean,
    "seed": as_integer,
    "logprobs": as_integer,
    "prompt_logprobs": as_integer,
    "skip_special_tokens": as_boolean,
}
OPTION_FIELDS: dict[str, Converter] = {
    "stream": as_boolean,
    "echo": as_boolean,
    "details": as_boolean,
    "priority": as_integer,
    "cache_salt": as_string,
    "num_speculative_tokens": as_integer,
    "timeout_seconds": as_number,
    "timeout": as_integer,  # whole microseconds, as Triton's clients send it
}
LIST_FIELDS = frozenset({"stop", "bad_words", "stop_token_ids", "allowed_token_ids"})
FIELDS = frozenset({*SAMPLING_FIELDS, *OPTION_FIELDS, *STRUCTURED_FIELDS})
# What clients and proxies add for the protocol's own sake; nothing in generation depends on it.
PROTOCOL_PARAMETERS = frozenset(
    {"binary_data_output", "sequence_id", "sequence_start", "sequence_end", "triton_enable_empty_final_response"}
)


def parse_parameters(parameters: Mapping[str, object], make_sampling: MakeSampling) -> GenerationRequest:
    """The request, but for its prompt, from names and values; `make_sampling` is `TextGenerator.sampling_params`.

    A value of None counts as not given. Raises `InvalidRequestError` that names the parameter and what is allowed.
    """
    sampling: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in PROTOCOL_PARAMETERS or value is None:
            continue
        if name in SAMPLING_FIELDS:
            sampling[name] = SAMPLING_FIELDS[name](name, value)
        elif name in OPTION_FIELDS:
            options[name] = OPTION_FIELDS[name](name, value)
        elif name not in STRUCTURED_FIELDS:
            raise InvalidRequestError(
                f"unknown parameter {shown(name)}; known are {', '.join(sorted(FIELDS))}", name[:80]
            )
    grammar = grammar_of(parameters)
    if grammar is not None:
        sampling["structured_outputs"] = grammar
    return GenerationRequest(params=make_sampling(sampling), **_request_fields(options))


def _request_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request from converted values, ranges checked."""
    num_drafts = options.get("num_speculative_tokens", 0)
    if num_drafts < 0:
        raise InvalidRequestError(
            f"num_speculative_tokens must be at least 0, got {num_drafts}", "num_speculative_tokens"
        )
    microseconds = options.pop("timeout", 0)
    if microseconds < 0:
        raise InvalidRequestError(f"timeout must be at least 0 microseconds, got {microseconds}", "timeout")
    if microseconds and options.get("timeout_seconds") is None:
        options["timeout_seconds"] = microseconds / MICROSECONDS
    if options.get("timeout_seconds") is not None:
        _check_seconds("timeout_seconds", options["timeout_seconds"])
    salt = options.pop("cache_salt", None)
    if salt is not None:
        if not 0 < len(salt) <= MAX_CACHE_SALT_CHARACTERS:
            raise InvalidRequestError(
                f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARACTERS} characters, got {len(salt)}", "cache_salt"
            )
        options["cache_keys"] = (f"salt={salt}",)
    return options


def parse_timeout_header(value: str | None) -> float | None:
    """The seconds that the header `X-Request-Timeout-Seconds` gives the request, None without the header."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        raise InvalidRequestError(f"{TIMEOUT_HEADER} must be a number of seconds, got {shown(value)}") from None
    _check_seconds(TIMEOUT_HEADER, seconds)
    return seconds


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequestError(f"{name} must be in (0, {MAX_TIMEOUT_SECONDS:g}], got {shown(seconds)}", name)
