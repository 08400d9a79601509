"""A head on the rank that samples: what drafts from hidden states of the model.

    blocks of a request     ┌ KV of the model ┐  ┌ features, and KV of the head ┐         features: `Head.features_of`
    position p                k(t₀…tₚ)            f(t₀…tₚ)   k(f(t₀…tₚ), tₚ₊₁)

Features are made of the model's hidden states of every step, and stay with the KV of their positions. So the head can compute
any position later, whoever has filled its block: behind a prefix hit, and after a preemption. Hidden states of some steps are
made features together, which costs little more than those of one. While it rests for long it sees no step at all, and then
reads what follows (`known_states`).

Only the last position of a block depends on more than the tokens up to there. Where two requests share a block and go on
differently each of them computes it for itself, in one place: the other one then reads keys of a wrong token at this one
position, which costs it nothing but, perhaps, a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from typing_extensions import override

from pagoda.execution.drafter import DraftedRow, Drafter
from pagoda.execution.input_batch import RowLayout
from pagoda.execution.known_states import KnownStates
from pagoda.execution.model_runner import ModelRunner, PendingStep
from pagoda.models.aux_hidden_states import AuxHiddenStates
from pagoda.models.causal_lm import KVCache
from pagoda.sampling.rows import Int64Array
from pagoda.sampling.transfer import to_device
from pagoda.scheduling.plan import StepPlan
from pagoda_kernels.types import AttentionMetadata

_MOST_KEPT = 64  # tokens whose hidden states wait to be made features


class Head(Protocol):
    """A layer that drafts from hidden states of the model: `Eagle3Head`, `MTPHead`."""

    @property
    def aux_layers(self) -> Sequence[int]:
        """The layers whose inputs it reads, see `AuxHiddenStates`."""

    def features_of(self, states: torch.Tensor) -> torch.Tensor:
        """What it makes of these, [T, len(aux_layers) * H] to [T, hidden_size]: it is kept of each token."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Eagle3Head.forward`."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] to float32 [N, vocab_size]."""

    def best_token(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the token with the greatest logit, int64 [N], and that logit."""


class HeadDrafter(Drafter):
    """`head` drafts for the model of `runner`, on its request slots and with its sampler.

    `states`: of the model, those of the head's layers. `features`: `[num_blocks, block_size, hidden_size]`, filled here, and
    `kv_cache` of the head's layer.
    """

    reads_ahead = 1

    def __init__(
        self,
        head: Head,
        runner: ModelRunner,
        states: AuxHiddenStates,
        features: torch.Tensor,
        kv_cache: KVCache,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__(runner.batch, max_num_batched_tokens)
        self._head = head
        self._sampler = runner.sampler
        self._states = states
        self._features = features.view(-1, features.shape[-1])
        self._kv_cache = kv_cache
        # Hidden states of the last `_num_kept` tokens that have no features yet, and where these go.
        self._kept_states = states.tensor.new_empty((_MOST_KEPT, states.tensor.shape[1]))
        self._kept_slots = torch.empty(_MOST_KEPT, dtype=torch.int64, device=features.device)
        self._num_kept = 0
        self._known = KnownStates(len(self._blocks), runner.batch.num_blocks, runner.batch.block_size)
        self._rests = False
        # Of the last pass, by request slot: the features that stand for those of the position behind it.
        self._next_features: dict[int, torch.Tensor] = {}

    @override
    def first_block_of(self, req_index: int) -> int:
        return self._known.num_skipped[req_index]

    @override
    def _take_blocks(self, plan: StepPlan) -> None:
        if self._rests != plan.drafter_rests:
            self._rests = plan.drafter_rests
            if self._rests:
                self._stop_seeing(plan)
            else:
                self._known.see_again(slot for slot, blocks in enumerate(self._blocks) if blocks)
        super()._take_blocks(plan)
        for entered in plan.new_requests:
            blocks, num_shared = entered.block_ids[0], entered.num_computed_tokens // self.batch.block_size
            if self._rests:
                self._known.forget(blocks[num_shared:])
            else:
                self._known.enter(entered.req_index, blocks, num_shared, self._is_full)
        for new in plan.new_blocks:
            if new.group == 0 and (self._rests or self._known.is_unseen(new.req_index)):
                self._known.forget(new.block_ids)
            elif new.group == 0:
                self._known.add(new.block_ids)

    def _stop_seeing(self, plan: StepPlan) -> None:
        """Hidden states of this step and those after it are not kept."""
        self._make_features()
        computed = dict(zip(plan.req_indices, plan.num_computed_tokens, strict=True))
        for slot, blocks in enumerate(self._blocks):
            self._known.forget(blocks[computed.get(slot, 0) // self.batch.block_size :])

    def _resume(self, plan: StepPlan) -> None:
        """Go on with the requests of `plan` that ran while this one rested."""
        for slot, num_computed in zip(plan.req_indices, plan.num_computed_tokens, strict=True):
            if self._known.is_unseen(slot):
                block, num_without = self._known.resume(slot, self._blocks[slot], num_computed, self._is_full)
                first = block * self.batch.block_size
                self._features[first : first + num_without] = 0

    @override
    @torch.inference_mode()
    def observe(self, plan: StepPlan, step: PendingStep) -> None:
        # What waits goes before what this step may have written anew: where drafts were refused, or into blocks that had
        # another owner.
        if plan.released_req_indices or plan.new_requests:
            self._make_features()
        if self._known.has_unseen:
            self._resume(plan)
        if step.inputs is None:
            return
        num_tokens = step.inputs.layout.num_tokens
        states, slots = self._states.tensor[:num_tokens], step.inputs.tensors[0].slot_mapping[:num_tokens]
        begin, end = self._num_kept, self._num_kept + num_tokens
        if end > _MOST_KEPT:
            self._make_features()
            begin, end = 0, num_tokens
        if end > _MOST_KEPT:
            self._features.index_copy_(0, slots, self._head.features_of(states))
            return
        self._kept_states[begin:end] = states
        self._kept_slots[begin:end] = slots
        self._num_kept = end
        if plan.draft_token_ids:
            self._make_features()

    def _make_features(self) -> None:
        if self._num_kept:
            states, slots = self._kept_states[: self._num_kept], self._kept_slots[: self._num_kept]
            self._features.index_copy_(0, slots, self._head.features_of(states))
            self._num_kept = 0

    @override
    def end_of(self, row: DraftedRow) -> int:
        return row.num_computed

    @override
    def run(self, plan: StepPlan, drafts: list[list[int]]) -> list[list[int]]:
        inputs = self.batch.build(plan)
        sampled: list[list[int]] = [[] for _ in plan.req_indices]
        self._make_features()
        if inputs is None:
            return sampled
        layout, tensors, pool = inputs.layout, inputs.tensors[0], self.batch.token_pool
        # A position goes with the token behind it, which every request slot has.
        offsets = layout.req_indices_on_device * pool.shape[1] + 1
        tokens_of = layout.query_start_loc[1:] - layout.query_start_loc[:-1]
        places = tensors.positions + offsets.repeat_interleave(tokens_of, output_size=layout.num_tokens)
        token_ids = pool.view(-1).index_select(0, places)
        if any(drafts):
            features = torch.stack([self._next_features[req_index] for req_index in layout.req_indices.tolist()])
        else:
            features = self._features.index_select(0, tensors.slot_mapping)
        metadata = _skipping(inputs.metadata()[0], [self._known.num_skipped[slot] for slot in plan.req_indices], layout)
        hidden, next_features = self._head(token_ids, features, tensors.positions, self._kv_cache, metadata)
        if not len(layout.sampling_rows):
            return sampled
        if layout.sampling_tokens is not None:
            hidden = hidden.index_select(0, layout.sampling_tokens)
            next_features = next_features.index_select(0, layout.sampling_tokens)
        self._next_features = dict(zip(layout.sampling_req_indices.tolist(), next_features, strict=True))
        drafted, best_logits = self._sample(hidden, layout, inputs.sampled_positions + 1)
        pool.view(-1).index_copy_(0, inputs.sampled_pool_index + 1, drafted)
        # Where no token of the draft vocabulary is allowed there is no draft.
        found = zip(layout.sampling_plan_rows, drafted.tolist(), best_logits.isfinite().tolist(), strict=True)
        for plan_row, token_id, is_sound in found:
            if is_sound:
                sampled[plan_row].append(token_id)
        return sampled

    def _sample(
        self, hidden: torch.Tensor, layout: RowLayout, positions: Int64Array
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 `[N]` of outputs `[N, hidden_size]` of the head, and their logits."""
        req_indices = layout.sampling_req_indices
        if self._sampler.is_greedy(req_indices):
            return self._head.best_token(hidden)
        output = self._sampler.sample(self._head.compute_logits(hidden), req_indices, positions, gives_logprobs=False)
        return output.token_ids, output.best_logits


def _skipping(metadata: AttentionMetadata, num_skipped: list[int], layout: RowLayout) -> AttentionMetadata:
    """The same without the first blocks of each row of the plan; positions stay what they are."""
    if not any(num_skipped):
        return metadata
    skipped = np.array(num_skipped, dtype=np.int64)[layout.plan_rows]
    table = torch.zeros_like(metadata.block_table)
    for row, number in enumerate(skipped.tolist()):
        table[row, : table.shape[1] - number] = metadata.block_table[row, number:]
    tokens = to_device((skipped * metadata.block_size).astype(np.int32), table.device)
    return replace(metadata, block_table=table, seq_lens=metadata.seq_lens - tokens, derived={})
