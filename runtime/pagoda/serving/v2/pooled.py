"""V2 requests to a model that pools, as jobs, and vectors, probabilities and scores as FP32 tensors.

In: `text_input` or `input_ids` as for generation, and `text_pair` BYTES, one text for all prompts or one for each, for models
that score two texts. Out: see `OUTPUTS_OF`; a model has those of its task, and `num_input_tokens`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from pagoda.errors import EngineNotReadyError, InvalidRequestError, NotSupportedError, shown
from pagoda.pooling.output import PooledOutput
from pagoda.pooling.params import CLASSIFY, EMBED, SCORE, PoolingParams
from pagoda.request import PoolingRequest
from pagoda.serving.generation import limit_time
from pagoda.serving.parameters import PROTOCOL_PARAMETERS, as_boolean, as_integer, as_number
from pagoda.serving.v2.call import V2Call
from pagoda.serving.v2.inference import INPUTS, TEXT_INPUT, V2Batch, V2Request, V2Response, prompts_of
from pagoda.serving.v2.tensors import BYTES, Tensor, text_of, values_of
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.pooling import TextPooler

TEXT_PAIR = "text_pair"
POOLED_INPUTS: tuple[dict[str, Any], ...] = (*INPUTS, {"name": TEXT_PAIR, "datatype": BYTES, "shape": [-1]})
_NUM_TOKENS = {"name": "num_input_tokens", "datatype": "INT64", "shape": [-1]}
OUTPUTS_OF: Mapping[str, tuple[dict[str, Any], ...]] = {
    EMBED: ({"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}, _NUM_TOKENS),
    SCORE: ({"name": "score", "datatype": "FP32", "shape": [-1]}, _NUM_TOKENS),
    CLASSIFY: (
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "label", "datatype": BYTES, "shape": [-1]},
        _NUM_TOKENS,
    ),
}
_INTEGERS = ("dimensions", "truncate_prompt_tokens", "priority", "timeout")
_NUMBERS = ("timeout_seconds",)
_BOOLEANS = ("normalize", "use_activation", "add_special_tokens", "stream")
_KNOWN = (*_INTEGERS, *_NUMBERS, *_BOOLEANS)


def outputs_of(pooler: TextPooler) -> tuple[dict[str, Any], ...]:
    """The outputs of the model. Raises `NotSupportedError` for one whose task this protocol does not have."""
    outputs = OUTPUTS_OF.get(pooler.task)
    if outputs is None:
        raise NotSupportedError(f"task {pooler.task} is served by /pooling only")
    return outputs


@dataclass(frozen=True, slots=True)
class PooledCall(V2Call):
    """A checked request to a model that pools."""

    pooler: TextPooler

    @override
    async def infer(self) -> V2Response:
        found = await self.model.runner.pool_all(self.batch.jobs, self.engine_request_id)  # type: ignore[arg-type]
        return V2Response(
            model_name=self.model.name,
            model_version=self.model.version,
            request_id=self.request.request_id,
            outputs=[self._tensor(name, found) for name in self.batch.output_names],
        )

    @override
    async def results(self) -> list[list[CompletionOutput]]:
        raise self._does_not_generate()

    @override
    def stream(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        raise self._does_not_generate()

    def _does_not_generate(self) -> NotSupportedError:
        return NotSupportedError(f"this model does not generate; it is served for {', '.join(self.pooler.tasks)}")

    def _tensor(self, name: str, found: Sequence[CompletionOutput]) -> Tensor:
        if name == "num_input_tokens":
            return Tensor(name, "INT64", (len(found),), [output.num_prompt_tokens for output in found])
        rows = np.array([np.frombuffer(_pooled(output).data, dtype=np.float32) for output in found])
        if name == "label":
            return Tensor(name, BYTES, (len(found),), [self.pooler.labels[index] for index in rows.argmax(axis=1)])
        shape = rows.shape[:1] if name == "score" else rows.shape
        return Tensor(name, "FP32", shape, rows.ravel())


def parse_pooled(request: V2Request, pooler: TextPooler) -> V2Batch:
    """The jobs of a request. Raises `InvalidRequestError` (naming what is allowed) for anything that does not fit."""
    tensors = {tensor.name: tensor for tensor in request.inputs}
    if len(tensors) != len(request.inputs):
        raise InvalidRequestError("an input is given twice", "inputs")
    text, ids, pair = (tensors.pop(name, None) for name in (TEXT_INPUT, "input_ids", TEXT_PAIR))
    if tensors:
        known = ", ".join(one["name"] for one in POOLED_INPUTS)
        raise InvalidRequestError(f"unknown input {shown(next(iter(tensors)))}; the inputs are {known}", "inputs")
    outputs = tuple(one["name"] for one in outputs_of(pooler))
    names = tuple(output.name for output in request.outputs) or outputs
    if unknown := [name for name in names if name not in outputs]:
        raise InvalidRequestError(
            f"unknown output {shown(unknown[0])}; the outputs of this model are {', '.join(outputs)}", "outputs"
        )
    values = _values(request.parameters)
    params = pooler.check(
        PoolingParams(
            pooler.task,
            normalize=values.get("normalize"),
            dimensions=values.get("dimensions"),
            use_activation=values.get("use_activation"),
        )
    )
    microseconds = values.get("timeout", 0)
    job = PoolingRequest(
        params=params,
        priority=values.get("priority", 0),
        truncate_prompt_tokens=values.get("truncate_prompt_tokens"),
        add_special_tokens=values.get("add_special_tokens", True),
        timeout_seconds=values.get("timeout_seconds", microseconds / 1e6 if microseconds else None),
    )
    job = limit_time(job, request.timeout_seconds)
    prompts = prompts_of(text, ids)
    pairs = _pairs(pair, len(prompts))
    if pairs is not None and pooler.scores_tokens:
        texts = [pooler.prompts.rerank(str(prompt), other) for prompt, other in zip(prompts, pairs, strict=True)]
        jobs = [replace(job, prompt=text_) for text_ in texts]
    else:
        jobs = [
            replace(job, prompt=prompt, pair=None if pairs is None else pairs[index])
            for index, prompt in enumerate(prompts)
        ]
    return V2Batch(jobs, names)


def _values(parameters: Mapping[str, object]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in PROTOCOL_PARAMETERS or value is None:
            continue
        if name in _INTEGERS:
            values[name] = as_integer(name, value)
        elif name in _NUMBERS:
            values[name] = as_number(name, value)
        elif name in _BOOLEANS:
            values[name] = as_boolean(name, value)
        else:
            raise InvalidRequestError(
                f"unknown parameter {shown(name)}; known are {', '.join(sorted(_KNOWN))}", name[:80]
            )
    if values.get("truncate_prompt_tokens", 0) < -1:
        raise InvalidRequestError("truncate_prompt_tokens must be at least -1", "truncate_prompt_tokens")
    if values.pop("stream", False):
        raise InvalidRequestError("a model that pools has nothing to stream", "stream")
    return values


def _pairs(tensor: Tensor | None, num_prompts: int) -> list[str] | None:
    if tensor is None:
        return None
    if tensor.datatype != BYTES:
        raise InvalidRequestError(f"{TEXT_PAIR} must be BYTES, got {tensor.datatype}", TEXT_PAIR)
    texts = [text_of(TEXT_PAIR, value) for value in values_of(tensor.data)]
    if len(texts) not in (1, num_prompts):
        raise InvalidRequestError(f"{TEXT_PAIR} must have 1 or {num_prompts} elements, got {len(texts)}", TEXT_PAIR)
    return texts * num_prompts if len(texts) == 1 else texts


def _pooled(output: CompletionOutput) -> PooledOutput:
    if output.pooled is None:
        raise EngineNotReadyError("the server ended the request; send it again")
    return output.pooled
