"""What a request becomes for the engine, without generating: token ids and sampling parameters, in vLLM's shapes.

llm-d's endpoint picker asks for the token ids, and finds the replica whose KV cache has their beginning.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from pagoda.request import EngineRequest
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.call import Call
from pagoda.serving.openai.types import SamplingFields
from pagoda.structured.spec import GrammarSpec

# Of `GrammarSpec`, by vLLM's names in `structured_outputs`.
_FORMS = {"json_schema": "json"}


class RenderedRequest(BaseModel):
    """A prompt as the model gets it, with what it is sampled by. `features`: of images and the like, so there are none."""

    request_id: str
    token_ids: list[int]
    features: None = None
    sampling_params: dict[str, Any]
    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0
    kv_transfer_params: None = None


async def rendered(model: ServedModel, body: SamplingFields, call: Call) -> list[dict[str, Any]]:
    """One object for each prompt of a call. Raises what running it would raise before its first token."""
    options = body.stream_options
    return [
        {
            "request_id": call.response_id,
            "token_ids": request.prompt_token_ids,
            "features": None,
            "sampling_params": _sampling_params(request, job.params.n),
            "model": model.name if body.model is None else body.model,
            "stream": bool(body.stream),
            "stream_options": None if options is None else options.model_dump(exclude_none=True),
            "cache_salt": body.cache_salt,
            "priority": job.priority,
            "kv_transfer_params": None,
        }
        for job in await call.jobs()
        for request in [await model.generator.rendered(job)]
    ]


def _sampling_params(request: EngineRequest, n: int) -> dict[str, Any]:
    """The parameters by vLLM's names, which are Pagoda's; `max_tokens` is what the context leaves, if nothing was asked."""
    params = asdict(request.sampling)
    del params["bad_words_token_ids"]
    spec = request.sampling.structured_outputs
    params |= {"n": n, "max_tokens": request.max_tokens, "structured_outputs": None if spec is None else _form(spec)}
    params["logit_bias"] = {str(token_id): bias for token_id, bias in (params["logit_bias"] or {}).items()} or None
    return params


def _form(spec: GrammarSpec) -> dict[str, Any]:
    if spec.kind == "json_object":
        return {"json_object": True}
    form: dict[str, Any] = {_FORMS.get(spec.kind, spec.kind): spec.parsed}
    return form if spec.whitespace else {**form, "disable_any_whitespace": True}
