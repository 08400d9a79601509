"""Rows of a step sorted by how their token is sampled. Made once for a set of rows, kept while it stays the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from pagoda.sampling import selection
from pagoda.sampling.noise import Float64Array, RequestNoise
from pagoda.sampling.params import SamplingParams
from pagoda.sampling.rows import Int64Array, SampledRows, SamplingContext

# Rows whose top_k differ at most by this factor share a group, for all pay for the greatest.
_TOP_K_CLASS_BITS = 2
_SMALLEST_TOP_K_CLASS = 6
# Candidates (or logits) handled at once: bounds what a step needs beside its logits.
_MAX_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class SamplingStep:
    """The processed logits of a step's N rows, and the random numbers of their requests.

    `logits` float32 `[N, padded vocabulary]`; `best_logits` float32 `[N]`, the greatest of each row.
    """

    logits: Tensor
    best_logits: Tensor
    rows: SampledRows
    noise: RequestNoise
    context: SamplingContext

    @cached_property
    def block_maxima(self) -> Tensor:
        """The greatest logit of each block, found once for all groups with top-k; see `selection.block_maxima`."""
        return selection.block_maxima(self.logits)

    def uniforms(self, rows: Int64Array, attempt: int = 0) -> Tensor:
        """For each of `rows` a number in [0, 1), float64 `[len(rows), 1]` on the device; a new one for each attempt."""
        req_indices, positions = self.rows.req_indices[rows], self.rows.positions[rows]
        numbers = (
            self.noise.at(req_indices, positions) if attempt == 0 else self.noise.again(req_indices, positions, attempt)
        )
        return self.context.to_device(numbers).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class RowParameters:
    """What sampling needs of R rows with random numbers, `[R]` on the host. `top_k` is 0 for rows without."""

    rows: Int64Array
    req_indices: Int64Array
    temperature: Float64Array
    top_k: Int64Array
    top_p: Float64Array
    min_p: Float64Array

    @classmethod
    def of(
        cls, rows: list[int], req_indices: Int64Array, params: Sequence[SamplingParams], vocab_size: int
    ) -> RowParameters:
        """Of `rows` of a step, of all of whose rows there are the request slots and the parameters."""
        chosen = [params[row] for row in rows]
        return cls(
            rows=np.array(rows, dtype=np.int64),
            req_indices=req_indices[rows],
            temperature=np.array([p.temperature for p in chosen], dtype=np.float64),
            top_k=np.array([p.top_k if 0 < p.top_k < vocab_size else 0 for p in chosen], dtype=np.int64),
            top_p=np.array([p.top_p for p in chosen], dtype=np.float64),
            min_p=np.array([p.min_p for p in chosen], dtype=np.float64),
        )

    def take(self, index: slice | npt.NDArray[np.bool_]) -> RowParameters:
        """Some of the rows."""
        return RowParameters(
            self.rows[index],
            self.req_indices[index],
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
        )

    def chunks(self, elements_per_row: int) -> Iterator[RowParameters]:
        """The rows, as many at a time as have at most `_MAX_ELEMENTS`, and at least one."""
        size = max(1, _MAX_ELEMENTS // elements_per_row)
        return (self.take(slice(first, first + size)) for first in range(0, len(self.rows), size))


@dataclass(frozen=True, slots=True)
class RandomRows(ABC):
    """R rows of a step whose tokens are drawn in one way. `rows` int64 `[R]` on the device, `host_rows` on the host."""

    rows: Tensor
    host_rows: Int64Array

    @abstractmethod
    def sample(self, step: SamplingStep) -> Tensor:
        """Token ids int64 `[R]`. A group of all rows of the step may change its logits."""


@dataclass(frozen=True, slots=True)
class TopKRows(RandomRows):
    """Rows with top-k: drawn from the `count` best tokens of each. Parameters are `[R, 1]`."""

    count: int
    top_k: Tensor
    inverse_temperature: Tensor
    min_p: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, params: RowParameters, context: SamplingContext) -> TopKRows:
        """The group of these rows."""
        return cls(
            rows=context.to_device(params.rows),
            host_rows=params.rows,
            count=int(params.top_k.max()),
            top_k=context.to_device(params.top_k[:, None]),
            inverse_temperature=context.to_device(1.0 / params.temperature[:, None]),
            min_p=context.to_device(params.min_p[:, None]),
            top_p=context.to_device(params.top_p[:, None]),
        )

    @override
    def sample(self, step: SamplingStep) -> Tensor:
        values, ids = selection.best_tokens(step.logits, step.block_maxima, self.rows, self.count)
        return selection.sample_from_top_k(
            values,
            ids,
            top_k=self.top_k,
            inverse_temperature=self.inverse_temperature,
            min_p=self.min_p,
            top_p=self.top_p,
            uniform=step.uniforms(self.host_rows),
        )


@dataclass(frozen=True, slots=True)
class FullVocabRows(RandomRows):
    """Rows without top-k, drawn by torch from the probabilities of the whole vocabulary. Parameters are `[R, 1]`.

    `inverse_temperature` is None where all are 1, `min_p` where no row has one. Either all rows have a `top_p` or none.
    """

    inverse_temperature: Tensor | None
    min_p: Tensor | None
    top_p: Tensor | None

    @classmethod
    def of(cls, params: RowParameters, context: SamplingContext) -> FullVocabRows:
        """The group of these rows, all with top-p or all without."""
        inverse_temperature = (1.0 / params.temperature[:, None]).astype(np.float32)
        min_p = params.min_p[:, None].astype(np.float32)
        return cls(
            rows=context.to_device(params.rows),
            host_rows=params.rows,
            inverse_temperature=context.to_device(inverse_temperature) if (inverse_temperature != 1.0).any() else None,
            min_p=context.to_device(min_p) if min_p.any() else None,
            top_p=context.to_device(params.top_p[:, None]) if (params.top_p < 1.0).all() else None,
        )

    @override
    def sample(self, step: SamplingStep) -> Tensor:
        is_whole = len(self.rows) == len(step.logits)
        weights = selection.to_weights_(
            step.logits if is_whole else step.logits.index_select(0, self.rows),
            step.best_logits.index_select(0, self.rows).unsqueeze(1),
            self.inverse_temperature,
            self.min_p,
        )
        if self.top_p is None:
            every = torch.arange(len(weights), device=weights.device)
            sums = selection.block_sums(weights)
            return selection.sample_by_weight(weights, sums, every, step.uniforms(self.host_rows))
        return selection.sample_top_p_by_rejection(
            weights, self.top_p, lambda attempt, indices: step.uniforms(self.host_rows[indices], attempt)
        )


@dataclass(frozen=True, slots=True)
class DeviceSampledRows(RandomRows):
    """Rows without top-k, drawn by one operation of the backend, which does not wait for the host. Parameters are `[R]`."""

    seeds: Tensor
    inverse_temperature: Tensor
    min_p: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, params: RowParameters, context: SamplingContext, seeds: Int64Array) -> DeviceSampledRows:
        """The group of these rows, whose requests have `seeds` int64 `[R]`, as bits."""
        return cls(
            rows=context.to_device(params.rows),
            host_rows=params.rows,
            seeds=context.to_device(seeds),
            inverse_temperature=context.to_device((1.0 / params.temperature).astype(np.float32)),
            min_p=context.to_device(params.min_p.astype(np.float32)),
            top_p=context.to_device(params.top_p),
        )

    @override
    def sample(self, step: SamplingStep) -> Tensor:
        return step.context.kernels.sample_top_p_by_rejection(
            step.logits,
            step.best_logits,
            self.rows,
            seeds=self.seeds,
            positions=step.context.to_device(step.rows.positions[self.host_rows]),
            inverse_temperature=self.inverse_temperature,
            min_p=self.min_p,
            top_p=self.top_p,
        )


@dataclass(frozen=True, slots=True)
class RowGroups:
    """How the rows of a step are sampled: those in no group are greedy.

    `logprob_rows` int64 on the host: rows that ask for log-probabilities, of `logprob_counts` tokens each: at most
    `num_best_logprobs` of the best, or those of `wanted_logprobs` (see `RawDistribution.of`).
    """

    random: list[RandomRows]
    logprob_rows: Int64Array
    logprob_counts: list[int]
    num_best_logprobs: int = 0
    wanted_logprobs: tuple[Tensor, Tensor] | None = None


class RowGrouper:
    """Sorts rows into groups. Rows without top-k are sampled by the backend where it implements that, else by torch."""

    def __init__(self, context: SamplingContext, noise: RequestNoise) -> None:
        self._context = context
        self._noise = noise
        samples_on_device = context.kernels.implements("sample_top_p_by_rejection")
        self._without_top_k = self._device_sampled if samples_on_device else self._full_vocab

    def group(self, params: Sequence[SamplingParams], req_indices: Int64Array) -> RowGroups:
        """The groups of N rows with these parameters and request slots, in row order."""
        vocab_size = self._context.vocab_size
        random = [row for row, p in enumerate(params) if not p.is_greedy and p.top_k != 1]
        asking = [row for row, p in enumerate(params) if p.logprobs is not None or p.logprob_token_ids is not None]
        best = [min(params[row].logprobs or 0, vocab_size) for row in asking]
        wanted = [params[row].logprob_token_ids or () for row in asking]
        return RowGroups(
            random=list(self._groups_of(RowParameters.of(random, req_indices, params, vocab_size))) if random else [],
            logprob_rows=np.array(asking, dtype=np.int64),
            logprob_counts=[len(ids) or count for ids, count in zip(wanted, best, strict=True)],
            num_best_logprobs=max(best, default=0),
            wanted_logprobs=self._wanted(wanted) if any(wanted) else None,
        )

    def _wanted(self, token_ids: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        rows = np.array([row for row, ids in enumerate(token_ids) if ids], dtype=np.int64)
        padded = np.zeros((len(rows), max(map(len, token_ids))), dtype=np.int64)
        for row, index in enumerate(rows.tolist()):
            padded[row, : len(token_ids[index])] = token_ids[index]
        return self._context.to_device(rows), self._context.to_device(padded)

    def _groups_of(self, params: RowParameters) -> Iterator[RandomRows]:
        has_top_k = params.top_k > 0
        yield from self._top_k(params.take(has_top_k))
        yield from self._without_top_k(params.take(~has_top_k))

    def _top_k(self, params: RowParameters) -> Iterator[RandomRows]:
        classes = np.array([_top_k_class(top_k) for top_k in params.top_k.tolist()], dtype=np.int64)
        for each in np.unique(classes):
            members = params.take(classes == each)
            for chunk in members.chunks(int(members.top_k.max()) * selection.BLOCK):
                yield TopKRows.of(chunk, self._context)

    def _full_vocab(self, params: RowParameters) -> Iterator[RandomRows]:
        has_top_p = params.top_p < 1.0
        for members in (params.take(has_top_p), params.take(~has_top_p)):
            for chunk in members.chunks(self._context.padded_vocab_size):
                yield FullVocabRows.of(chunk, self._context)

    def _device_sampled(self, params: RowParameters) -> Iterator[RandomRows]:
        if len(params.rows):
            yield DeviceSampledRows.of(params, self._context, self._noise.seeds_of(params.req_indices))


def _top_k_class(top_k: int) -> int:
    return max(0, (top_k - 1).bit_length() - _SMALLEST_TOP_K_CLASS + 1) // _TOP_K_CLASS_BITS
