"""Penalties on tokens that occurred before.

They keep no counts. The tokens of a request slot are in the token pool anyway, so a step gathers them, and touches their
logits and no others. That costs time in proportion to the sequence, as the attention of one head of one layer does, but no
memory in proportion to the vocabulary, nothing after preemption, and it is right when the newest token is known to the
device only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagoda.sampling.logits_processors import LogitsProcessor
from pagoda.sampling.rows import Int64Array, SampledRows, SlotRequest

# Tokens gathered at once: bounds the memory of a step whose rows are many and long.
_MAX_GATHERED = 1 << 20


@dataclass(frozen=True, slots=True)
class _Repetition:
    factor: float


@dataclass(frozen=True, slots=True)
class _PreparedRows:
    """Of P rows: `rows` int64 `[P]` on the host, `strengths` float32 `[P, 1]` each, `starts` int64 `[P]` on the host."""

    rows: Int64Array
    starts: Int64Array
    strengths: tuple[Tensor, ...]


class RepetitionPenalty(LogitsProcessor[_Repetition, _PreparedRows]):
    """`repetition_penalty`: divides positive and multiplies other logits of all tokens in prompt or output (CTRL, 2019)."""

    def _state_of(self, request: SlotRequest) -> _Repetition | None:
        factor = request.params.repetition_penalty
        return None if factor == 1.0 else _Repetition(factor)

    def _prepare(self, rows: Int64Array, states: list[_Repetition]) -> _PreparedRows:
        factors = np.array([[state.factor] for state in states], dtype=np.float32)
        return _PreparedRows(rows, np.zeros_like(rows), (self.context.to_device(factors),))

    def _change(self, logits: Tensor, rows: SampledRows, prepared: _PreparedRows) -> None:
        (factors,) = prepared.strengths
        flat_logits = logits.view(-1)
        for chunk, flat, _ in _history(self, rows, prepared):
            factor = factors[chunk]
            old = flat_logits[flat]
            flat_logits[flat] = torch.where(
                old > 0, old / factor, old * factor
            )  # an id met twice is written twice, equal


@dataclass(frozen=True, slots=True)
class _OutputPenalties:
    presence: float
    frequency: float
    num_prompt_tokens: int


class OutputPenalties(LogitsProcessor[_OutputPenalties, _PreparedRows]):
    """`presence_penalty`, once for each token in the output, and `frequency_penalty`, for each time it is there."""

    def _state_of(self, request: SlotRequest) -> _OutputPenalties | None:
        params = request.params
        if not params.presence_penalty and not params.frequency_penalty:
            return None
        return _OutputPenalties(params.presence_penalty, params.frequency_penalty, request.num_prompt_tokens)

    def _is_active(self, state: _OutputPenalties, position: int) -> bool:
        return position > state.num_prompt_tokens

    def _prepare(self, rows: Int64Array, states: list[_OutputPenalties]) -> _PreparedRows:
        presence = np.array([[state.presence] for state in states], dtype=np.float32)
        frequency = np.array([[state.frequency] for state in states], dtype=np.float32)
        starts = np.array([state.num_prompt_tokens for state in states], dtype=np.int64)
        return _PreparedRows(rows, starts, (self.context.to_device(presence), self.context.to_device(frequency)))

    def _change(self, logits: Tensor, rows: SampledRows, prepared: _PreparedRows) -> None:
        presence, frequency = prepared.strengths
        flat_logits = logits.view(-1)
        for chunk, flat, is_token in _history(self, rows, prepared):
            flat_logits[flat] = flat_logits[flat] - presence[chunk]
            each_time = torch.where(is_token, -frequency[chunk], 0.0)
            flat_logits.index_add_(0, flat.view(-1), each_time.view(-1))


def _history(
    processor: LogitsProcessor[Any, _PreparedRows], rows: SampledRows, prepared: _PreparedRows
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Where in the flattened logits the tokens of some rows are, from their start to their position, some rows at a time.

    Yields the chunk of the prepared rows, `flat` int64 `[p, L]` and `is_token` bool `[p, L]`. Rows shorter than L repeat
    their first token, where `is_token` is False: harmless where a second time changes nothing.
    """
    context = processor.context
    lengths = rows.positions[prepared.rows] - prepared.starts
    begins = rows.req_indices[prepared.rows] * context.token_pool.shape[1] + prepared.starts
    offsets = prepared.rows * context.padded_vocab_size
    num_rows = max(1, _MAX_GATHERED // int(lengths.max()))
    for first in range(0, len(lengths), num_rows):
        chunk = slice(first, first + num_rows)
        columns = torch.arange(int(lengths[chunk].max()), device=context.device)
        is_token = columns < context.to_device(lengths[chunk]).unsqueeze(1)
        index = context.to_device(begins[chunk]).unsqueeze(1) + columns * is_token
        tokens = context.token_pool.view(-1)[index]
        yield chunk, tokens + context.to_device(offsets[chunk]).unsqueeze(1), is_token
