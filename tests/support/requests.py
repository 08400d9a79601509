"""Requests as the scheduler gets them."""

from __future__ import annotations

from typing import Any

from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.request import Request


def make_request(
    request_id: str, num_tokens: int = 4, first: int | None = None, max_tokens: int = 8, **fields: Any
) -> Request:
    """A prompt of `num_tokens` ids from `first` on; without it, of ids that no request of another name has."""
    start = 1000 * sum(map(ord, request_id)) if first is None else first
    params = fields.pop("params", SamplingParams(ignore_eos=True))
    prompt = list(range(start, start + num_tokens))
    return Request(
        EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params, max_tokens=max_tokens, **fields)
    )
