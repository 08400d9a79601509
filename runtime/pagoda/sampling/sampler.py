"""The sampler: from a step's logits to one token id a row, all rows at once.

    raw logits ─▶ (kept for rows that ask for logprobs) ─▶ processors: allowed ids, min_tokens, logit_bias, bad words,
    repetition, presence and frequency penalty ─▶ temperature ─▶ min-p ─▶ top-k ─▶ top-p ─▶ inverse CDF

A row's token depends on its own logits and its own (seed, position) only. Nothing is read back from the device: on a GPU, one
kernel finds every row's best token, and another draws for all rows without top-k (`pagoda_kernels.sampling`); it finds by
itself which of them must draw again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagoda.sampling import selection
from pagoda.sampling.logits_processors import AllowedTokens, BadWords, LogitBias, LogitsProcessor, MinTokens
from pagoda.sampling.logprobs import LogprobTensors, RawDistribution
from pagoda.sampling.noise import SlotNoise
from pagoda.sampling.penalties import OutputPenalties, RepetitionPenalty
from pagoda.sampling.row_groups import DrawnGroup, OpenGroup, RankedGroup, RowGroups, make_row_groups
from pagoda.sampling.rows import Int64Array, SampledRows, SamplingContext, SlotRequest
from pagoda_kernels import backend
from pagoda_kernels.sampling import choose_greedy, choose_open

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

    `logprobs` is of the rows `logprob_rows`, each of which asked for `logprob_counts` best tokens.
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


class Sampler:
    """Sampling state of all slots. `token_pool`: int64 `[max_num_seqs, max_model_len + 1]`, kept up to date by its owner.

    `seed` is of requests that bring none; None takes it from the operating system's entropy.
    """

    def __init__(self, *, vocab_size: int, token_pool: Tensor, seed: int | None) -> None:
        self.context = SamplingContext(vocab_size, selection.padded_size(vocab_size), token_pool)
        self._processors = [processor(self.context) for processor in PROCESSORS]
        self._noise = SlotNoise(token_pool.shape[0], seed)
        self._requests: dict[int, SlotRequest] = {}
        self._composition = 0
        self._slots = np.empty(0, dtype=np.int64)
        self._row_of_slot = np.full(token_pool.shape[0], -1, dtype=np.int64)
        self._groups: RowGroups | None = None
        self._draws_on_device = token_pool.device.type == "cuda"
        self._has_greedy_kernel = self._draws_on_device or (
            backend.active.name == "cpu" and token_pool.device.type == "cpu"
        )

    def add(self, slot: int, request: SlotRequest) -> None:
        """Let a request enter `slot`. On `InvalidRequestError`, for an id outside the vocabulary, the slot stays empty."""
        self.remove(slot)
        try:
            for processor in self._processors:
                processor.add(slot, request)
        except BaseException:  # raised on: no processor may keep a request that did not enter
            self.remove(slot)
            raise
        self._noise.add(slot, request.params)
        self._requests[slot] = request

    def remove(self, slot: int) -> None:
        """Empty `slot`; it may be empty already."""
        for processor in self._processors:
            processor.remove(slot)
        self._requests.pop(slot, None)
        self._groups = None

    def sample(self, logits: Tensor, slots: Int64Array, positions: Int64Array) -> SamplerOutput:
        """Choose a token for each of N rows; at most one row a slot.

        `logits` float32 `[N, vocab_size]` may be changed. `slots` and `positions` int64 `[N]`: the row's slot, and the
        position that the token will take, which is the number of tokens the request has. `slots` must not be changed later.
        """
        logits = selection.pad_to_blocks(logits)
        rows, groups = self._rows(slots, positions)
        raw = None
        if groups.logprob_counts:
            asking = self.context.upload(groups.logprob_rows)
            raw = RawDistribution.of(logits.index_select(0, asking), max(groups.logprob_counts))
        for processor in self._processors:
            if processor.states:
                processor.apply(logits, rows)
        if self._has_greedy_kernel and not (groups.ranked or groups.open):
            token_ids, best_logits = choose_greedy(logits)
        else:
            maxima = selection.block_maxima(logits)
            best_logits = maxima.amax(-1)
            token_ids = self._choose(logits, maxima, best_logits, rows, groups)
        if groups.drawn is not None:
            token_ids.index_copy_(0, groups.drawn.rows, self._draw(logits, best_logits, rows, groups.drawn))
        return SamplerOutput(
            token_ids=token_ids,
            best_logits=best_logits,
            logprobs=raw.of_tokens(token_ids.index_select(0, asking)) if raw is not None else None,
            logprob_rows=groups.logprob_rows,
            logprob_counts=groups.logprob_counts,
        )

    def _rows(self, slots: Int64Array, positions: Int64Array) -> tuple[SampledRows, RowGroups]:
        """This step's rows, and their groups: the last step's, if nothing but the positions changed."""
        if self._groups is None or not (slots is self._slots or np.array_equal(slots, self._slots)):
            self._groups = None  # until all below has succeeded
            self._composition += 1
            self._row_of_slot[self._slots] = -1
            self._slots = slots
            self._row_of_slot[slots] = np.arange(len(slots))
            params = [self._requests[slot].params for slot in slots.tolist()]
            seeds = self._noise.seeds_of(slots) if self._draws_on_device else None
            self._groups = make_row_groups(params, self.context, seeds)
        return SampledRows(slots, positions, self._row_of_slot, self._composition), self._groups

    def _choose(
        self, logits: Tensor, maxima: Tensor, best_logits: Tensor, rows: SampledRows, groups: RowGroups
    ) -> Tensor:
        """Token ids int64 `[N]`, each group's by its own way; those of rows that are drawn on the device are left open."""
        if groups.greedy is not None and not groups.has_random_rows:
            return selection.argmax(logits, maxima, groups.greedy)
        token_ids = torch.empty(len(rows.slots), dtype=torch.int64, device=logits.device)
        if groups.greedy is not None:
            token_ids.index_copy_(0, groups.greedy, selection.argmax(logits, maxima, groups.greedy))
        if groups.ranked or groups.open:
            uniform = self.context.upload(self._noise.at(rows.slots, rows.positions)).unsqueeze(1)
        for ranked in groups.ranked:
            token_ids.index_copy_(0, ranked.rows, _choose_ranked(logits, maxima, uniform, ranked))
        for group in groups.open:  # last: a group that is all rows turns the logits into probabilities in place
            token_ids.index_copy_(0, group.rows, self._choose_open(logits, best_logits, uniform, rows, group))
        return token_ids

    def _choose_open(
        self, logits: Tensor, best_logits: Tensor, uniform: Tensor, rows: SampledRows, group: OpenGroup
    ) -> Tensor:
        """Token ids int64 `[R]` of rows without top-k, by torch."""
        whole = len(group.rows) == len(logits)
        weights = selection.to_weights_(
            logits if whole else logits.index_select(0, group.rows),
            best_logits.index_select(0, group.rows).unsqueeze(1),
            group.inverse_temperature,
            group.min_p,
        )
        uniform = uniform.index_select(0, group.rows)
        if group.top_p is None:
            every = torch.arange(len(weights), device=logits.device)
            return selection.choose_by_weight(weights, selection.block_sums(weights), every, uniform)

        def draw(attempt: int, indices: list[int]) -> Tensor:
            if attempt == 0:
                return uniform
            own = group.host_rows[indices]
            again = self._noise.again(rows.slots[own], rows.positions[own], attempt)
            return self.context.upload(again).unsqueeze(1)

        return selection.choose_nucleus(weights, group.top_p, draw)

    def _draw(self, logits: Tensor, best_logits: Tensor, rows: SampledRows, group: DrawnGroup) -> Tensor:
        """Token ids int64 `[R]` of rows without top-k, in one kernel, which asks the host for nothing."""
        return choose_open(
            logits,
            best_logits,
            group.rows,
            seeds=group.seeds,
            positions=self.context.upload(rows.positions[group.host_rows]),
            inverse_temperature=group.inverse_temperature,
            min_p=group.min_p,
            top_p=group.top_p,
        )


def _choose_ranked(logits: Tensor, maxima: Tensor, uniform: Tensor, group: RankedGroup) -> Tensor:
    """Token ids int64 `[R]` of rows with top-k."""
    values, ids = selection.best_tokens(logits, maxima, group.rows, group.count)
    return selection.choose_ranked(
        values,
        ids,
        top_k=group.top_k,
        inverse_temperature=group.inverse_temperature,
        min_p=group.min_p,
        top_p=group.top_p,
        uniform=uniform.index_select(0, group.rows),
    )
