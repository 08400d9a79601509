"""Rows of a step sorted by what it takes to choose their token. Made once for a set of rows, kept while it stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagoda.sampling.params import SamplingParams
from pagoda.sampling.rows import Int64Array, SamplingContext
from pagoda.sampling.selection import BLOCK

# Rows whose top_k differ at most by this factor share a group, for all pay for the greatest.
_TOP_K_CLASS_BITS = 2
_SMALLEST_TOP_K_CLASS = 6
# Candidates (or logits) handled at once: bounds what a step needs beside its logits.
_MAX_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """Rows with top-k: chosen among their `count` best tokens. Tensors are `[R]` (`rows`) and `[R, 1]`."""

    rows: Tensor
    count: int
    top_k: Tensor
    inverse_temperature: Tensor
    min_p: Tensor
    top_p: Tensor


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """Rows without top-k: their probabilities must be known as a whole. Tensors are `[R]` (`rows`) and `[R, 1]`.

    `host_rows` int64 `[R]` is `rows` on the host.
    `inverse_temperature` is None where all are 1, `min_p` where no row has one. Either all rows have a `top_p` or none.
    """

    rows: Tensor
    host_rows: Int64Array
    inverse_temperature: Tensor | None
    min_p: Tensor | None
    top_p: Tensor | None


@dataclass(frozen=True, slots=True)
class DrawnGroup:
    """Rows without top-k on a GPU, where one kernel draws for all of them (`pagoda_kernels.sampling.choose_open`).

    Its arguments, `[R]`, and `host_rows` int64 `[R]`, which are `rows` on the host.
    """

    rows: Tensor
    host_rows: Int64Array
    seeds: Tensor
    inverse_temperature: Tensor
    min_p: Tensor
    top_p: Tensor


@dataclass(frozen=True, slots=True)
class RowGroups:
    """All rows of a step: greedy ones (int64 `[R]`, None if there are none), those with top-k, and the others.

    These are `drawn` on a GPU, `open` elsewhere.
    `logprob_rows` int64 on the host: rows that ask for log-probabilities, of `logprob_counts` best tokens each.
    """

    greedy: Tensor | None
    ranked: list[RankedGroup]
    open: list[OpenGroup]
    drawn: DrawnGroup | None
    logprob_rows: Int64Array
    logprob_counts: list[int]

    @property
    def has_random_rows(self) -> bool:
        """Whether any row needs a random number."""
        return bool(self.ranked or self.open or self.drawn)


def make_row_groups(
    params: Sequence[SamplingParams], context: SamplingContext, seeds: Int64Array | None = None
) -> RowGroups:
    """Sort rows with these parameters, in row order, into groups. `seeds` int64 `[N]`: the rows', to draw on the device."""
    greedy: list[int] = []
    nucleus: list[int] = []
    unbounded: list[int] = []
    ranked: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        if p.is_greedy or p.top_k == 1:
            greedy.append(row)
        elif 0 < p.top_k < context.vocab_size:
            ranked.setdefault(_top_k_class(p.top_k), []).append(row)
        elif p.top_p < 1.0:
            nucleus.append(row)
        else:
            unbounded.append(row)
    asking = [row for row, p in enumerate(params) if p.logprobs is not None]
    return RowGroups(
        greedy=context.upload(np.array(greedy, dtype=np.int64)) if greedy else None,
        ranked=[
            _ranked_group(piece, params, context)
            for rows in ranked.values()
            for piece in _pieces(rows, max(params[row].top_k for row in rows) * BLOCK)
        ],
        open=[
            _open_group(piece, params, context)
            for rows in (nucleus, unbounded)
            for piece in _pieces(rows, context.padded_vocab_size)
            if seeds is None
        ],
        drawn=_drawn_group(sorted(nucleus + unbounded), params, context, seeds) if seeds is not None else None,
        logprob_rows=np.array(asking, dtype=np.int64),
        logprob_counts=[min(params[row].logprobs or 0, context.vocab_size) for row in asking],
    )


def _top_k_class(top_k: int) -> int:
    return max(0, (top_k - 1).bit_length() - _SMALLEST_TOP_K_CLASS + 1) // _TOP_K_CLASS_BITS


def _pieces(rows: list[int], elements_per_row: int) -> list[list[int]]:
    size = max(1, _MAX_ELEMENTS // elements_per_row)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _ranked_group(rows: list[int], params: Sequence[SamplingParams], context: SamplingContext) -> RankedGroup:
    top_k = [params[row].top_k for row in rows]
    return RankedGroup(
        rows=context.upload(np.array(rows, dtype=np.int64)),
        count=max(top_k),
        top_k=context.upload(_column(top_k, np.int64)),
        inverse_temperature=context.upload(_column([1.0 / params[row].temperature for row in rows], np.float64)),
        min_p=context.upload(_column([params[row].min_p for row in rows], np.float64)),
        top_p=context.upload(_column([params[row].top_p for row in rows], np.float64)),
    )


def _open_group(rows: list[int], params: Sequence[SamplingParams], context: SamplingContext) -> OpenGroup:
    inverse_temperature = _column([1.0 / params[row].temperature for row in rows], np.float32)
    min_p = _column([params[row].min_p for row in rows], np.float32)
    top_p = _column([params[row].top_p for row in rows], np.float64)
    host_rows = np.array(rows, dtype=np.int64)
    return OpenGroup(
        rows=context.upload(host_rows),
        host_rows=host_rows,
        inverse_temperature=context.upload(inverse_temperature) if (inverse_temperature != 1.0).any() else None,
        min_p=context.upload(min_p) if min_p.any() else None,
        top_p=context.upload(top_p) if params[rows[0]].top_p < 1.0 else None,
    )


def _drawn_group(
    rows: list[int], params: Sequence[SamplingParams], context: SamplingContext, seeds: Int64Array
) -> DrawnGroup | None:
    if not rows:
        return None
    host_rows = np.array(rows, dtype=np.int64)
    return DrawnGroup(
        rows=context.upload(host_rows),
        host_rows=host_rows,
        seeds=context.upload(seeds[host_rows]),
        inverse_temperature=context.upload(np.array([1.0 / params[row].temperature for row in rows], dtype=np.float32)),
        min_p=context.upload(np.array([params[row].min_p for row in rows], dtype=np.float32)),
        top_p=context.upload(np.array([params[row].top_p for row in rows], dtype=np.float64)),
    )


def _column(values: Sequence[float], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    return np.array(values, dtype=dtype)[:, None]
