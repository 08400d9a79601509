"""The sampler: from a step's logits to one token id a row, all rows at once.

    raw logits ─▶ (kept for rows that ask for logprobs) ─▶ processors: allowed ids, min_tokens, logit_bias, bad words,
    repetition, presence and frequency penalty ─▶ temperature ─▶ min-p ─▶ top-k ─▶ top-p ─▶ inverse CDF

A row's token depends on its own logits and its own (seed, position) only. One operation of the kernel backend finds every
row's best token; then each group of rows that are not greedy draws its tokens in its own way (`row_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pagoda.sampling import selection
from pagoda.sampling.logits_processors import (
    AllowedTokens,
    BadWords,
    LogitBias,
    LogitsProcessor,
    MinTokens,
    StepProcessor,
)
from pagoda.sampling.logprobs import LogprobTensors, RawDistribution
from pagoda.sampling.noise import RequestNoise
from pagoda.sampling.penalties import OutputPenalties, RepetitionPenalty
from pagoda.sampling.row_groups import RowGrouper, RowGroups, SamplingStep
from pagoda.sampling.rows import Int64Array, SampledRows, SamplingContext, SlotRequest
from pagoda_kernels.interface import KernelBackend

# In this order they are applied: what is forbidden, then biases, then penalties.
PROCESSORS: tuple[type[LogitsProcessor[Any, Any]], ...] = (
    AllowedTokens,
    MinTokens,
    LogitBias,
    BadWords,
    RepetitionPenalty,
    OutputPenalties,
)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Of N rows, on the device: `token_ids` int64 `[N]`, always inside the vocabulary, and `best_logits` float32 `[N]`.

    `logprobs` is of the rows `logprob_rows`, each of which asked for those of `logprob_counts` tokens.
    """

    token_ids: Tensor
    best_logits: Tensor
    logprobs: LogprobTensors | None
    logprob_rows: Int64Array
    logprob_counts: list[int]


def row_error(best_logit: float) -> str | None:
    """Why a row whose greatest processed logit is this cannot be sampled, or None if it can."""
    if math.isfinite(best_logit):
        return None
    if math.isnan(best_logit):
        return "the model computed NaN logits for this request"
    if best_logit > 0:
        return "the model computed infinite logits for this request"
    return "no token is allowed here: the request's parameters together forbid every one"


_MOST_COMPOSITIONS = 4


@dataclass(frozen=True, slots=True)
class _Composition:
    """Rows of request slots that stay who they are; see `SampledRows`."""

    number: int
    req_indices: Int64Array
    first_rows: Int64Array
    num_rows: Int64Array
    groups: RowGroups


class Sampler:
    """Sampling state of all request slots. `token_pool`: int64 `[max_num_seqs, max_model_len + 1]`, kept up to date by its
    owner.

    `kernels`: of the token pool's device. `seed` is for requests without one; None takes it from the operating system's
    entropy.
    """

    def __init__(self, *, vocab_size: int, token_pool: Tensor, kernels: KernelBackend, seed: int | None) -> None:
        self.context = SamplingContext(vocab_size, selection.padded_size(vocab_size), token_pool, kernels)
        self._processors = [processor(self.context) for processor in PROCESSORS]
        self._noise = RequestNoise(token_pool.shape[0], seed)
        self._requests: dict[int, SlotRequest] = {}
        self._grouper = RowGrouper(self.context, self._noise)
        # Those of the last steps, the newest first: a draft model's passes, with fewer rows, are between the model's steps.
        self._compositions: list[_Composition] = []
        self._num_compositions = 0

    def add(self, req_index: int, request: SlotRequest) -> None:
        """Let a request enter `req_index`. On `InvalidRequestError`, for an id outside the vocabulary, the request slot
        stays empty."""
        self.remove(req_index)
        try:
            for processor in self._processors:
                processor.add(req_index, request)
        except BaseException:  # raised on: no processor may keep a request that did not enter
            self.remove(req_index)
            raise
        self._noise.add(req_index, request.params)
        self._requests[req_index] = request

    def remove(self, req_index: int) -> None:
        """Empty `req_index`; it may be empty already."""
        for processor in self._processors:
            processor.remove(req_index)
        self._requests.pop(req_index, None)
        self._compositions.clear()

    def sample(
        self,
        logits: Tensor,
        req_indices: Int64Array,
        positions: Int64Array,
        step_processors: Sequence[StepProcessor] = (),
        *,
        gives_logprobs: bool = True,
    ) -> SamplerOutput:
        """Choose a token for each of N rows; several rows of a request slot follow each other, by position.

        `logits` float32 `[N, vocab_size]` may be changed. `req_indices` and `positions` int64 `[N]`: the row's request slot,
        and the position that the token will take, which is the number of tokens before it. `req_indices` must not be
        changed later. `step_processors` come after those of the requests' parameters. Without `gives_logprobs`
        those that requests ask for are left out: of drafts nobody wants them.
        """
        logits = selection.pad_to_blocks(logits)
        rows, groups = self._rows(req_indices, positions)
        raw = None
        if groups.logprob_counts and gives_logprobs:
            asking = self.context.to_device(groups.logprob_rows)
            raw = RawDistribution.of(logits.index_select(0, asking), groups.num_best_logprobs, groups.wanted_logprobs)
        for processor in self._processors:
            if processor.states:
                processor.apply(logits, rows)
        for step_processor in step_processors:
            step_processor.apply(logits, rows)
        token_ids, best_logits = self.context.kernels.greedy_sample(logits)
        step = SamplingStep(logits, best_logits, rows, self._noise, self.context)
        for group in groups.random:
            token_ids.index_copy_(0, group.rows, group.sample(step))
        return SamplerOutput(
            token_ids=token_ids,
            best_logits=best_logits,
            logprobs=raw.of_tokens(token_ids.index_select(0, asking)) if raw is not None else None,
            logprob_rows=groups.logprob_rows,
            logprob_counts=groups.logprob_counts,
        )

    def is_greedy(self, req_indices: Int64Array) -> bool:
        """Whether all of these rows take the greatest of their logits as they are."""
        return not self._composition_of(req_indices).groups.random and not any(
            processor.states for processor in self._processors
        )

    def _rows(self, req_indices: Int64Array, positions: Int64Array) -> tuple[SampledRows, RowGroups]:
        """This step's rows, and their groups: those of an earlier step, if nothing but the positions changed."""
        known = self._composition_of(req_indices)
        rows = SampledRows(known.req_indices, positions, known.first_rows, known.num_rows, known.number)
        return rows, known.groups

    def _composition_of(self, req_indices: Int64Array) -> _Composition:
        compositions = self._compositions
        for place, known in enumerate(compositions):
            if req_indices is known.req_indices or np.array_equal(req_indices, known.req_indices):
                if place:
                    compositions.insert(0, compositions.pop(place))
                return known
        self._num_compositions += 1
        num_slots = self.context.token_pool.shape[0]
        first_rows = np.zeros(num_slots, dtype=np.int64)
        # Backwards, for of several rows the last one written counts, which then is the first.
        first_rows[req_indices[::-1]] = np.arange(len(req_indices) - 1, -1, -1)
        params = [self._requests[req_index].params for req_index in req_indices.tolist()]
        found = _Composition(
            self._num_compositions,
            req_indices,
            first_rows,
            np.bincount(req_indices, minlength=num_slots),
            self._grouper.group(params, req_indices),
        )
        compositions.insert(0, found)
        del compositions[_MOST_COMPOSITIONS:]
        return found
