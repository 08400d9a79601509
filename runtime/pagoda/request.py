"""One request, from the parser of whichever protocol to the model runner.

    GenerationRequest ────────────▶ EngineRequest, one a sequence ──▶ scheduling.Request.spec ──▶ plan.NewRequest.spec
    made by serving or `LLM`        made by the text layer            beside its state            beside its blocks

Every layer passes on the whole record and keeps its own state beside it. An option for the scheduler or the runner
is a field of `BaseRequest`: the parser sets it and its consumer reads it, and nothing in between names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pagoda.adapters import LoraAdapter
from pagoda.pooling.params import PoolingParams
from pagoda.sampling.params import SamplingParams

MAX_TOKEN_ID = 2**31 - 1


class TokenIds(Sequence[int]):
    """Token ids of a large request, four bytes each until the request is admitted. `array`: int32, from 0."""

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[np.int32]) -> None:
        self.array = array

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        return TokenIds(self.array[index]) if isinstance(index, slice) else int(self.array[index])

    def __len__(self) -> int:
        return len(self.array)

    def tolist(self) -> list[int]:
        """As the engine takes them."""
        ids: list[int] = self.array.tolist()
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRequest:
    """What all forms of a request have.

    `request_id`: shown in logs and answers; may be used again. `params`: what to compute. `priority`: lower is served first,
    among the requests of its flow. `tenant`: whose it is; tenants share the engine by their `tenant_weight`.
    `fairness_id`: the flow within its tenant, whose flows share its part equally. `ttft_slo`: when its first token is wanted,
    in seconds from arrival.
    `cache_keys`: only requests for which they are equal share cached prefixes. Each begins with its kind (`salt=…`), so that
    keys of two kinds are never equal. `adapter`: the LoRA adapter that computes it; None: the model alone.
    `num_speculative_tokens`: the most drafts in a step, where that is less than
    `speculative_config` says; 0: no speculative decoding of this request.
    """

    request_id: str = ""
    params: SamplingParams | PoolingParams
    priority: int = 0
    tenant: str = ""
    tenant_weight: float = 1.0
    fairness_id: str = ""
    ttft_slo: float | None = None
    cache_keys: tuple[str, ...] = ()
    adapter: LoraAdapter | None = None
    num_speculative_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How the text of an answer becomes an assistant's message.

    `tools`: JSON schemas of the parameters of the tools that may be called, by name; without any, no calls are looked for.
    `parallel_tool_calls`: else the answer ends with its first call. `continued`: the beginning of the message, where the
    client gave one and the prompt ends with it. `is_constrained`: a grammar holds the answer to the format of calls, so that
    markers are what they say, however they are spelled. `only_calls`: and allows nothing but calls behind the reasoning.
    `thinking_token_budget`: tokens of reasoning, then it is ended.
    """

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel_tool_calls: bool = True
    continued: str = ""
    is_constrained: bool = False
    only_calls: bool = False
    thinking_token_budget: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(BaseRequest):
    """One prompt to complete, `params.n` times: text, or token ids that are taken as they are.

    `prompt` is empty, which is refused, until it is known. `add_special_tokens` concerns a text prompt only. `echo`: the
    prompt precedes the generated text. `prediction`: what the output may be, for speculative decoding. `stream`: the client
    asked for chunks as they come. `details`: the generate routes add ids and log-probabilities. `timeout_seconds`: from
    arrival; None leaves the server's own limit. `answer`: the answer is a message in the model's own format, which is parsed;
    None leaves it as text.
    """

    params: SamplingParams
    prompt: str | list[int] | TokenIds = ""
    add_special_tokens: bool = True
    echo: bool = False
    prediction: str = ""
    stream: bool = False
    details: bool = False
    timeout_seconds: float | None = None
    answer: AnswerOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest(BaseRequest):
    """One prompt to pool: text, or token ids that are taken as they are; with `pair`, two texts that are read together.

    `truncate_prompt_tokens`: keep so many tokens of one that is longer, the special tokens around it included; -1: as many as
    the model takes; None: a longer one is refused. `timeout_seconds` as of a `GenerationRequest`.
    """

    params: PoolingParams
    prompt: str | list[int] | TokenIds = ""
    pair: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    timeout_seconds: float | None = None
    stream: bool = False
    details: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest(BaseRequest):
    """One sequence to generate (`n > 1` is fanned out before this point), or one prompt to pool, whose `max_tokens` is 1.

    `request_id` is unique in an engine core; `EngineClient.submit` makes it so. `prompt_token_ids`: at least one id, all below
    the vocabulary size; the list is shared and never changed. `max_tokens`: resolved, at least 1, and
    `len(prompt_token_ids) + max_tokens <= max_model_len`. `prediction_token_ids`: what the output may be, for speculative
    decoding; ids within the vocabulary. `eos_token_ids` end generation unless `params.ignore_eos`.
    `arrival_time`: `time.monotonic()` seconds. `has_place`: the queue does not refuse it; `EngineClient.reserve` has kept its
    place. `output_token_ids`: the beginning of the output, which an engine that failed had made; what follows is made.
    """

    prompt_token_ids: list[int]
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    prediction_token_ids: list[int] = field(default_factory=list)
    arrival_time: float = 0.0
    has_place: bool = False
    output_token_ids: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        request: BaseRequest,
        *,
        prompt_token_ids: list[int],
        max_tokens: int,
        eos_token_ids: tuple[int, ...],
        prediction_token_ids: list[int],
        arrival_time: float,
    ) -> EngineRequest:
        """The engine's form of `request`: all of `BaseRequest` as it is, whatever fields that has."""
        return cls(
            **{name: getattr(request, name) for name in _BASE_FIELDS},
            prompt_token_ids=prompt_token_ids,
            max_tokens=max_tokens,
            eos_token_ids=eos_token_ids,
            prediction_token_ids=prediction_token_ids,
            arrival_time=arrival_time,
        )

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def prefix_keys(self) -> tuple[str, ...]:
        """What is in the root of its prefix hash: its cache keys, and its adapter with the version."""
        return self.cache_keys if self.adapter is None else (*self.cache_keys, self.adapter.cache_key)

    @property
    def sampling(self) -> SamplingParams:
        """The parameters of a request that generates."""
        assert isinstance(self.params, SamplingParams)
        return self.params

    @property
    def pooling(self) -> PoolingParams:
        """The parameters of a request that pools."""
        assert isinstance(self.params, PoolingParams)
        return self.params

    @property
    def needs_every_token(self) -> bool:
        """Whether something is made of every token of the prompt, so that none may come from the prefix cache."""
        if isinstance(self.params, PoolingParams):
            return self.params.reads_all_tokens
        return self.params.prompt_logprobs is not None


_BASE_FIELDS = tuple(field.name for field in fields(BaseRequest))


def sequence_ids(request_id: str, n: int) -> list[str]:
    """What the `n` sequences of a request are called in the engine."""
    return [request_id] if n == 1 else [f"{request_id}-{index}" for index in range(n)]
