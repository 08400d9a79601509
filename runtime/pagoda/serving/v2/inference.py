"""V2 (Open Inference Protocol) requests as generation jobs, and results as output tensors, whatever carries them.

In: `text_input` BYTES `[n]` or `[n, 1]`, or `input_ids` of an integer datatype, `[t]` or `[n, t]`. Sampling comes as request
parameters or as tensors of the same names: one element for all prompts, or one for each; a field that is a list (`stop`,
`stop_token_ids`, ...) is `[k]` for all prompts or `[n, k]`. Out: see `OUTPUTS`. Where the sampling parameter `n` is above 1,
every output has a second dimension of that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.request import MAX_TOKEN_ID, GenerationRequest, TokenIds
from pagoda.serving.generation import MAX_SEQUENCES_PER_REQUEST, Job, check_cost, limit_time
from pagoda.serving.json_values import finite_logprob
from pagoda.serving.parameters import FIELDS, LIST_FIELDS, MAX_PARAMETER_IDS, MakeSampling, parse_parameters
from pagoda.serving.v2.tensors import BYTES, INTEGER_DATATYPES, Tensor, text_of, values_of
from pagoda.text.output import CompletionOutput, PositionLogprobs, TokenLogprob

TEXT_INPUT = "text_input"
INPUT_IDS = "input_ids"
SHARED_MEMORY = "shared_memory"
INPUTS: tuple[dict[str, Any], ...] = (
    {"name": TEXT_INPUT, "datatype": BYTES, "shape": [-1]},
    {"name": INPUT_IDS, "datatype": "INT64", "shape": [-1, -1]},
)
OUTPUTS: tuple[dict[str, Any], ...] = (
    {"name": "text_output", "datatype": BYTES, "shape": [-1]},
    {"name": "output_ids", "datatype": "INT64", "shape": [-1, -1]},
    {"name": "finish_reason", "datatype": BYTES, "shape": [-1]},
    {"name": "num_input_tokens", "datatype": "INT64", "shape": [-1]},
    {"name": "num_output_tokens", "datatype": "INT64", "shape": [-1]},
    {"name": "logprobs", "datatype": BYTES, "shape": [-1]},
)
OUTPUT_NAMES = tuple(output["name"] for output in OUTPUTS)
POOLED_OUTPUT_NAMES = ("embedding", "score", "probabilities", "label")
"""Of models that pool, see `serving.v2.pooled`: a request's outputs are read before its model is known."""
MAX_TENSORS = 64
MAX_REQUEST_ID_CHARACTERS = 256
PADDING_ID = -1
"""Fills `output_ids` behind the shorter sequences."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output the client named; `binary_data` is None where it said nothing about the form."""

    name: str
    binary_data: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class V2Request:
    """A decoded inference request of any protocol.

    `method` names the protocol's method: it begins the ids of the request's sequences in the engine. `outputs` is empty where
    the client named none. `timeout_seconds`: how long the client waits, beside what `parameters` say.
    """

    method: str
    model_name: str
    model_version: str = ""
    request_id: str = ""
    inputs: list[Tensor]
    parameters: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    timeout_seconds: float | None = None

    def gives(self, name: str) -> bool:
        """Whether the client gave the parameter `name`, in either form."""
        return name in self.parameters or any(tensor.name == name for tensor in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class V2Response:
    """The outputs of a finished request; `request_id` is what the client gave."""

    model_name: str
    model_version: str
    request_id: str
    outputs: list[Tensor]


@dataclass(frozen=True, slots=True)
class V2Batch:
    """What a V2 request asks for: one job a prompt. `stream` and `output_names` hold for the whole request."""

    jobs: Sequence[Job]
    output_names: tuple[str, ...]

    @property
    def stream(self) -> bool:
        """Whether the client asked for chunks as they come."""
        return self.jobs[0].stream


def check_num_tensors(name: str, count: int) -> None:
    """Refuse more `inputs` or `outputs` than there are names of them, before any is decoded."""
    if count > MAX_TENSORS:
        raise InvalidRequestError(f"{name} has {count} entries; at most {MAX_TENSORS} are allowed", name)


def check_request_id(request_id: str) -> str:
    """`request_id`, which every response and every event of a stream repeats."""
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequestError(
            f"id has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARACTERS} are allowed", "id"
        )
    return request_id


def requested_output(name: str, parameters: Mapping[str, object]) -> RequestedOutput:
    """One entry of a request's `outputs`, checked."""
    if name not in OUTPUT_NAMES and name not in POOLED_OUTPUT_NAMES:
        raise InvalidRequestError(f"unknown output {shown(name)}; the outputs are {', '.join(OUTPUT_NAMES)}", "outputs")
    binary_data: bool | None = None
    for key, value in parameters.items():
        if key == "binary_data" and isinstance(value, bool):
            binary_data = value
        elif key == "binary_data":
            raise InvalidRequestError(
                f"output {name!r}: binary_data must be true or false, got {shown(value)}", "outputs"
            )
        elif key == "classification" or key.startswith(SHARED_MEMORY):
            raise NotSupportedError(f"output {name!r}: {shown(key)} is not supported")
    return RequestedOutput(name, binary_data)


def refuse_shared_memory(name: str, parameters: Iterable[str]) -> None:
    """Raise `NotSupportedError` if the input `name` has one of Triton's parameters for shared memory."""
    for key in parameters:
        if key.startswith(SHARED_MEMORY):
            raise NotSupportedError(f"input {shown(name)}: {shown(key)} is not supported; send the values themselves")


def parse_infer(request: V2Request, make_sampling: MakeSampling) -> V2Batch:
    """The jobs of a request; raises `InvalidRequestError` (naming what is allowed) for anything that does not fit."""
    tensors: dict[str, Tensor] = {}
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise InvalidRequestError(f"input {shown(tensor.name)} is given twice", "inputs")
        if tensor.name not in FIELDS and tensor.name not in (TEXT_INPUT, INPUT_IDS):
            known = ", ".join((TEXT_INPUT, INPUT_IDS, *sorted(FIELDS)))
            raise InvalidRequestError(f"unknown input {shown(tensor.name)}; the inputs are {known}", "inputs")
        tensors[tensor.name] = tensor
    prompts = prompts_of(tensors.pop(TEXT_INPUT, None), tensors.pop(INPUT_IDS, None))
    for name in tensors:
        if name in request.parameters:
            raise InvalidRequestError(f"{name} is given both as a tensor and as a parameter", name)
    columns = {name: _column(tensor, len(prompts)) for name, tensor in tensors.items()}
    jobs = _jobs(prompts, request.parameters, columns, make_sampling)
    output_names = _output_names(request.outputs, jobs)
    _check_together(jobs)
    return V2Batch([limit_time(job, request.timeout_seconds) for job in jobs], output_names)


def output_tensors(results: Sequence[Sequence[CompletionOutput]], names: Iterable[str]) -> list[Tensor]:
    """The named outputs of finished prompts, in the order asked for: `results[prompt][sequence]`."""
    flat = [sequence for sequences in results for sequence in sequences]
    num_sequences = len(results[0])
    shape = (len(results),) if num_sequences == 1 else (len(results), num_sequences)
    return [_output_tensor(name, flat, shape) for name in names]


def logprobs_json(logprobs: Sequence[PositionLogprobs] | None) -> list[dict[str, Any]]:
    """One object a generated token: its id, text, log-probability and rank, and the `top` candidates."""
    return [
        {**_candidate(position.chosen), "top": [_candidate(candidate) for candidate in position.top]}
        for position in logprobs or ()
    ]


def _candidate(token: TokenLogprob) -> dict[str, Any]:
    return {
        "id": token.token_id,
        "text": token.token,
        "logprob": finite_logprob(token.logprob),
        "rank": token.rank,
    }


def prompts_of(text: Tensor | None, ids: Tensor | None) -> list[str | list[int] | TokenIds]:
    """The prompts of the two inputs, of which one is given."""
    if text is not None and ids is not None:
        raise InvalidRequestError(f"give {TEXT_INPUT} or {INPUT_IDS}, not both", "inputs")
    if text is not None:
        if text.datatype != BYTES:
            raise InvalidRequestError(f"{TEXT_INPUT} must be BYTES, got {text.datatype}", TEXT_INPUT)
        if not (len(text.shape) == 1 or (len(text.shape) == 2 and text.shape[1] == 1)) or not len(text.data):
            raise InvalidRequestError(
                f"{TEXT_INPUT} must have shape [n] or [n, 1], n at least 1, got {list(text.shape)}", TEXT_INPUT
            )
        _check_num_prompts(TEXT_INPUT, len(text.data))
        return [text_of(TEXT_INPUT, element) for element in text.data]
    if ids is None:
        raise InvalidRequestError(f"an input {TEXT_INPUT} (BYTES) or {INPUT_IDS} (INT64) is required", "inputs")
    if ids.datatype not in INTEGER_DATATYPES:
        raise InvalidRequestError(f"{INPUT_IDS} must be INT64, got {ids.datatype}", INPUT_IDS)
    if len(ids.shape) not in (1, 2) or not len(ids.data):
        raise InvalidRequestError(
            f"{INPUT_IDS} must have shape [t] or [n, t], both at least 1, got {list(ids.shape)}", INPUT_IDS
        )
    length = ids.shape[-1]
    _check_num_prompts(INPUT_IDS, len(ids.data) // length)
    data = np.asarray(ids.data)  # integers all of them
    if data.min() < 0 or data.max() > MAX_TOKEN_ID:
        wrong = int(data.min()) if data.min() < 0 else int(data.max())
        raise InvalidRequestError(f"{INPUT_IDS} must hold token ids from 0, got {wrong}", INPUT_IDS)
    data = data.astype(np.int32)
    return [TokenIds(data[start : start + length]) for start in range(0, len(data), length)]


def _check_num_prompts(name: str, num_prompts: int) -> None:
    if num_prompts > MAX_SEQUENCES_PER_REQUEST:
        raise InvalidRequestError(
            f"{name} has {num_prompts} prompts; at most {MAX_SEQUENCES_PER_REQUEST} are allowed", name
        )


def _column(tensor: Tensor, num_prompts: int) -> list[Any]:
    """One value a prompt of a tensor that carries a parameter."""
    if len(tensor.data) > MAX_PARAMETER_IDS:
        raise InvalidRequestError(
            f"{tensor.name} has {len(tensor.data)} elements; at most {MAX_PARAMETER_IDS} are allowed", tensor.name
        )
    values = values_of(tensor.data)
    if tensor.datatype == BYTES:
        values = [text_of(tensor.name, value) for value in values]
    if tensor.name in LIST_FIELDS:
        if len(tensor.shape) <= 1:
            return [values] * num_prompts
        if len(tensor.shape) == 2 and tensor.shape[0] == num_prompts:
            width = tensor.shape[1]
            return [values[index * width : (index + 1) * width] for index in range(num_prompts)]
        raise InvalidRequestError(
            f"{tensor.name} must have shape [k] or [{num_prompts}, k], got {list(tensor.shape)}", tensor.name
        )
    if len(values) == 1:
        return values * num_prompts
    if len(values) == num_prompts and math.prod(tensor.shape[1:]) == 1:
        return values
    raise InvalidRequestError(
        f"{tensor.name} must have shape [1] or [{num_prompts}], got {list(tensor.shape)}", tensor.name
    )


def _jobs(
    prompts: Sequence[str | list[int] | TokenIds],
    parameters: Mapping[str, object],
    columns: Mapping[str, list[Any]],
    make_sampling: MakeSampling,
) -> list[GenerationRequest]:
    """A job for each prompt, with one record of parameters where they are the same for all."""
    differing = {name for name, column in columns.items() if any(value is not column[0] for value in column)}
    shared = {**parameters, **{name: column[0] for name, column in columns.items() if name not in differing}}
    job = parse_parameters(shared, make_sampling)
    if job.params.prompt_logprobs is not None or "prompt_logprobs" in differing:
        raise InvalidRequestError("prompt_logprobs is available on /v1/completions only", "prompt_logprobs")
    check_cost(job.params, len(prompts))
    if not differing:
        return [replace(job, prompt=prompt) for prompt in prompts]
    jobs = []
    for index, prompt in enumerate(prompts):
        row = {name: columns[name][index] for name in differing}
        jobs.append(replace(parse_parameters({**shared, **row}, make_sampling), prompt=prompt))
    return jobs


def _output_names(outputs: tuple[RequestedOutput, ...], jobs: list[GenerationRequest]) -> tuple[str, ...]:
    if not outputs:
        wants_logprobs = any(job.params.logprobs is not None for job in jobs)
        return OUTPUT_NAMES if wants_logprobs else OUTPUT_NAMES[:-1]
    names = tuple(output.name for output in outputs)
    if of_others := [name for name in names if name not in OUTPUT_NAMES]:
        raise InvalidRequestError(
            f"unknown output {shown(of_others[0])}; the outputs are {', '.join(OUTPUT_NAMES)}", "outputs"
        )
    if len(set(names)) != len(names):
        raise InvalidRequestError(f"an output is named twice in {', '.join(names[: len(OUTPUT_NAMES)])}", "outputs")
    return names


def _check_together(jobs: list[GenerationRequest]) -> None:
    """What must hold for all prompts of a request together."""
    first, *others = jobs
    if any(job.params.n != first.params.n for job in others):
        raise InvalidRequestError("n must be the same for all prompts of a request", "n")
    if any(_shared(job) != _shared(first) for job in others):
        raise InvalidRequestError("stream and timeout must be the same for all prompts of a request", "stream")
    check_cost(first.params, len(jobs))


def _shared(job: GenerationRequest) -> tuple[object, ...]:
    return job.stream, job.timeout_seconds


def _output_tensor(name: str, results: list[CompletionOutput], shape: tuple[int, ...]) -> Tensor:
    datatype = next(output["datatype"] for output in OUTPUTS if output["name"] == name)
    data: list[Any]
    if name == "output_ids":
        longest = max(len(result.token_ids) for result in results)
        data = []
        for result in results:
            data += result.token_ids
            data += [PADDING_ID] * (longest - len(result.token_ids))
        return Tensor(name, datatype, (*shape, longest), data)
    if name == "text_output":
        data = [result.text for result in results]
    elif name == "finish_reason":
        data = [str(result.finish_reason or "") for result in results]
    elif name == "num_input_tokens":
        data = [result.num_prompt_tokens for result in results]
    elif name == "num_output_tokens":
        data = [len(result.token_ids) for result in results]
    else:
        data = [orjson.dumps(logprobs_json(result.logprobs)).decode() for result in results]
    return Tensor(name, datatype, shape, data)
