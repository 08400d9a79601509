"""TGI's requests as completions, the ones that this server has."""

from __future__ import annotations

from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.serving.openai.requests import parse_request
from pagoda.serving.openai.types import CompletionRequest
from pagoda.serving.tgi.types import TgiParameters, TgiRequest

# What is not there, and the values that ask for nothing.
_NOT_THERE: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "typical_p": (None, 1.0),
    "watermark": (None, False),
}


def completion_request(request: TgiRequest) -> CompletionRequest:
    """The completion that `request` is. Raises `InvalidRequestError` or `NotSupportedError`, which name TGI's parameter."""
    parameters = request.parameters or TgiParameters()
    for name, harmless in _NOT_THERE.items():
        if getattr(parameters, name) not in harmless:
            raise NotSupportedError(f"{name}={getattr(parameters, name)!r} is not supported by this server", name)
    if parameters.max_new_tokens is not None and parameters.max_new_tokens < 1:
        raise InvalidRequestError(
            f"max_new_tokens must be at least 1, got {parameters.max_new_tokens}", "max_new_tokens"
        )
    if parameters.temperature is not None and parameters.temperature <= 0:
        raise InvalidRequestError(
            f"temperature must be greater than 0, got {parameters.temperature:g}; without it, and without do_sample, the most "
            "probable token is taken",
            "temperature",
        )
    if parameters.truncate is not None and parameters.truncate < 1:
        raise InvalidRequestError(f"truncate must be at least 1, got {parameters.truncate}", "truncate")
    body: dict[str, Any] = {
        "prompt": request.inputs,
        "max_tokens": parameters.max_new_tokens,
        **_sampling(parameters),
        "repetition_penalty": _or(parameters.repetition_penalty, 1.0),
        "frequency_penalty": _or(parameters.frequency_penalty, 0.0),
        "seed": parameters.seed,
        "stop": parameters.stop or None,
        "include_stop_str_in_output": True,
        "logprobs": parameters.top_n_tokens or 0,
        "prompt_logprobs": 0 if parameters.decoder_input_details else None,
        **_form(parameters),
    }
    return parse_request(CompletionRequest, {name: value for name, value in body.items() if value is not None})


def _sampling(parameters: TgiParameters) -> dict[str, Any]:
    """TGI takes the most probable token unless something asks for sampling; the checkpoint's defaults do not count there."""
    temperature, top_k, top_p = parameters.temperature, parameters.top_k, parameters.top_p
    if not parameters.do_sample and _or(temperature, 1.0) == 1.0 and not top_k and _or(top_p, 1.0) == 1.0:
        return {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {"temperature": _or(temperature, 1.0), "top_k": top_k or 0, "top_p": _or(top_p, 1.0), "min_p": 0.0}


def _form(parameters: TgiParameters) -> dict[str, Any]:
    grammar = parameters.grammar
    if grammar is None:
        return {}
    value = grammar.value
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise InvalidRequestError("grammar of type json_schema needs an object with the member schema", "grammar")
        value = value["schema"]
    return {"structured_outputs": {"regex" if grammar.type == "regex" else "json": value}}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
