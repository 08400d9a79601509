"""Parameters that change logits, each a strategy of its own with the state of the request slots that use it.

A processor changes logits float32 `[N, padded vocabulary]` in place. One that no request uses is not called; one whose
requests have no row in a step does no tensor operation. Those that read earlier
tokens take them from the token pool on the device: the newest may not yet be known to the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pagoda.errors import InvalidRequestError
from pagoda.sampling.rows import Int64Array, SampledRows, SamplingContext, SlotRequest

State = TypeVar("State")
Prepared = TypeVar("Prepared")


class LogitsProcessor(ABC, Generic[State, Prepared]):
    """One parameter's effect on the logits of all rows that use it.

    `State` is what a request slot needs; `Prepared` is what a set of rows needs, made once and kept while the set stays the
    same.
    """

    def __init__(self, context: SamplingContext) -> None:
        self.context = context
        self.states: dict[int, State] = {}
        self._prepared_key: tuple[int, ...] | None = None
        self._prepared: Prepared | None = None

    @abstractmethod
    def _state_of(self, request: SlotRequest) -> State | None:
        """The state for a request, or None for one that does not use the parameter. `InvalidRequestError` for bad ids."""

    @abstractmethod
    def _prepare(self, rows: Int64Array, states: list[State]) -> Prepared:
        """Tensors for these rows of the batch and their states; they depend on nothing else."""

    @abstractmethod
    def _change(self, logits: Tensor, rows: SampledRows, prepared: Prepared) -> None:
        """Change the logits of the prepared rows in place."""

    def _is_active(self, state: State, position: int) -> bool:
        """Whether a state still has an effect on the token at `position`."""
        del state, position
        return True

    def add(self, req_index: int, request: SlotRequest) -> None:
        """Let a request enter `req_index`."""
        state = self._state_of(request)
        if state is not None:
            self.states[req_index] = state

    def remove(self, req_index: int) -> None:
        """Forget the request in `req_index`, if this processor knew it."""
        self.states.pop(req_index, None)

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        """Change the logits of those rows whose requests use the parameter."""
        active: list[int] = []
        for req_index, state in self.states.items():
            active += [row for row in rows.of(req_index) if self._is_active(state, int(rows.positions[row]))]
        if not active:
            return
        key = (rows.composition, *active)
        if self._prepared is None or key != self._prepared_key:
            states = [self.states[int(rows.req_indices[row])] for row in active]
            self._prepared = self._prepare(np.array(active, dtype=np.int64), states)
            self._prepared_key = key
        self._change(logits, rows, self._prepared)

    def _check_ids(self, name: str, ids: Iterable[int]) -> Int64Array:
        """`ids` as an array; `InvalidRequestError` names the first one outside the vocabulary."""
        array = np.fromiter(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self.context.vocab_size)]
        if outside.size:
            raise InvalidRequestError(
                f"{name} has token id {outside[0]}; ids must be between 0 and {self.context.vocab_size - 1}", name
            )
        return array

    def _flat(self, rows: Int64Array, ids: list[Int64Array]) -> Tensor:
        """Indices into flattened logits: of `ids[i]` in `rows[i]`, for all i in a row. Int64, on the device."""
        lengths = [len(array) for array in ids]
        return self.context.to_device(np.repeat(rows * self.context.padded_vocab_size, lengths) + np.concatenate(ids))


class StepProcessor(Protocol):
    """Changes logits by what is known of this step alone, such as the masks of grammars: nothing is kept for the next."""

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        """Change logits float32 `[N, padded vocabulary]` in place, each row by the tokens before its own position."""


class AllowedTokens(LogitsProcessor[Int64Array, tuple[Tensor, Tensor]]):
    """`allowed_token_ids`: every other token is forbidden."""

    def _state_of(self, request: SlotRequest) -> Int64Array | None:
        allowed = request.params.allowed_token_ids
        return None if allowed is None else self._check_ids("allowed_token_ids", allowed)

    def _prepare(self, rows: Int64Array, states: list[Int64Array]) -> tuple[Tensor, Tensor]:
        return self.context.to_device(rows), self._flat(rows, states)

    def _change(self, logits: Tensor, rows: SampledRows, prepared: tuple[Tensor, Tensor]) -> None:
        changed_rows, flat = prepared
        allowed = logits.view(-1).index_select(0, flat)
        logits.index_fill_(0, changed_rows, float("-inf"))
        logits.view(-1).index_copy_(0, flat, allowed)


@dataclass(frozen=True, slots=True)
class _ForbiddenUntil:
    ids: Int64Array
    position: int


class MinTokens(LogitsProcessor[_ForbiddenUntil, Tensor]):
    """`min_tokens`: what would end generation is forbidden until there are that many output tokens.

    With a grammar its masks do it, for they know whether anything else is allowed.
    """

    def _state_of(self, request: SlotRequest) -> _ForbiddenUntil | None:
        params = request.params
        endings = {*request.eos_token_ids, *params.stop_token_ids}
        ids = np.array([i for i in endings if 0 <= i < self.context.vocab_size], dtype=np.int64)
        form = params.structured_outputs
        if not params.min_tokens or not ids.size or (form is not None and form.has_grammar):
            return None
        return _ForbiddenUntil(ids, request.num_prompt_tokens + params.min_tokens)

    def _is_active(self, state: _ForbiddenUntil, position: int) -> bool:
        return position < state.position

    def _prepare(self, rows: Int64Array, states: list[_ForbiddenUntil]) -> Tensor:
        return self._flat(rows, [state.ids for state in states])

    def _change(self, logits: Tensor, rows: SampledRows, prepared: Tensor) -> None:
        logits.view(-1).index_fill_(0, prepared, float("-inf"))


@dataclass(frozen=True, slots=True)
class _Bias:
    ids: Int64Array
    values: np.ndarray[Any, np.dtype[np.float32]]


class LogitBias(LogitsProcessor[_Bias, tuple[Tensor, Tensor]]):
    """`logit_bias`: added to the logits of single tokens."""

    def _state_of(self, request: SlotRequest) -> _Bias | None:
        bias = request.params.logit_bias
        if not bias:
            return None
        return _Bias(self._check_ids("logit_bias", bias), np.fromiter(bias.values(), dtype=np.float32))

    def _prepare(self, rows: Int64Array, states: list[_Bias]) -> tuple[Tensor, Tensor]:
        values = np.concatenate([state.values for state in states])
        return self._flat(rows, [state.ids for state in states]), self.context.to_device(values)

    def _change(self, logits: Tensor, rows: SampledRows, prepared: tuple[Tensor, Tensor]) -> None:
        flat, values = prepared
        logits.view(-1).index_add_(0, flat, values)


@dataclass(frozen=True, slots=True)
class _PreparedWords:
    """Of all W bad words of some rows: the token to forbid, and the tokens that must precede it.

    `flat` int64 `[W]` (the last token, in flattened logits), `rows` and `lengths` int64 `[W]` on the host, `prefixes` int64
    `[W, L]` right-aligned behind -1, which matches anything.
    """

    flat: Tensor
    rows: Int64Array
    lengths: Int64Array
    prefixes: Tensor


class BadWords(LogitsProcessor[tuple[Int64Array, ...], _PreparedWords]):
    """`bad_words`: the last token of a word is forbidden where the tokens before it are the rest of the word.

    Prompt and output both count as tokens before.
    """

    longest: ClassVar[int] = 256

    def _state_of(self, request: SlotRequest) -> tuple[Int64Array, ...] | None:
        words = tuple(self._check_ids("bad_words", word) for word in request.params.bad_words_token_ids)
        if any(not 0 < len(word) <= self.longest for word in words):
            raise InvalidRequestError(f"bad_words must each have 1 to {self.longest} tokens", "bad_words")
        return words or None

    def _prepare(self, rows: Int64Array, states: list[tuple[Int64Array, ...]]) -> _PreparedWords:
        words = [word for state in states for word in state]
        row_of_word = np.repeat(rows, [len(state) for state in states])
        longest_prefix = max(len(word) for word in words) - 1
        prefixes = np.full((len(words), longest_prefix), -1, dtype=np.int64)
        for index, word in enumerate(words):
            prefixes[index, longest_prefix - (len(word) - 1) :] = word[:-1]
        return _PreparedWords(
            flat=self._flat(row_of_word, [word[-1:] for word in words]),
            rows=row_of_word,
            lengths=np.array([len(word) for word in words], dtype=np.int64),
            prefixes=self.context.to_device(prefixes),
        )

    def _change(self, logits: Tensor, rows: SampledRows, prepared: _PreparedWords) -> None:
        positions = rows.positions[prepared.rows]
        long_enough = self.context.to_device(positions >= prepared.lengths - 1)
        width = prepared.prefixes.shape[1]
        before = np.maximum(positions[:, None] - width + np.arange(width), 0)
        flat = rows.req_indices[prepared.rows][:, None] * self.context.token_pool.shape[1] + before
        tokens = self.context.token_pool.view(-1)[self.context.to_device(flat)]
        matches = ((tokens == prepared.prefixes) | (prepared.prefixes < 0)).all(-1) & long_enough
        logits.view(-1).index_add_(0, prepared.flat, torch.where(matches, float("-inf"), 0.0))
