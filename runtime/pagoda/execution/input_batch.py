"""What the device knows of the requests in the slots, and the inputs of a step made from it.

    token_pool  [max_num_seqs, max_model_len + 1]      block_table  [max_num_seqs, max_blocks]
      slot 0    │ prompt and output of a request …       slot 0     │ its blocks, in order, then 0 …
      slot 1    │ …                                      slot 1     │ …

Both are allocated once. A plan brings what changed; everything else of a step is gathered from here by index, so building a
step costs the same at any context length. A sampled token is written into the pool on the device, at the position after the
last one computed: the next step can be built, and given to the device, before the host has seen it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagoda.errors import InvalidRequestError, PagodaError
from pagoda.sampling.rows import Int64Array
from pagoda.sampling.transfer import upload, upload_all
from pagoda.scheduling.plan import NewRequest, StepPlan
from pagoda_kernels.attention import AttentionMetadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The batch of one step: R rows, T tokens, S rows that sample.

    Rows are in batch order: those with one token first. `plan_rows`, `slots`, `num_computed_tokens`, `num_scheduled_tokens`
    and `first_tokens` int64 `[R]` are on the host: each row's index in the plan, its entries there, and the index of its first
    token in the batch. `input_ids` and `positions` int64 `[T]`. `sampling_rows` int64 `[S]` on the host: batch rows that
    sample. `sampling_tokens` int64 `[S]`: their last tokens in the batch, None if these are all tokens in order.
    `sampled_pool_index` int64 `[S]`: where their sampled tokens belong in the flattened token pool.
    """

    plan_rows: Int64Array
    slots: Int64Array
    num_computed_tokens: Int64Array
    num_scheduled_tokens: Int64Array
    first_tokens: Int64Array
    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    sampling_rows: Int64Array
    sampling_tokens: Tensor | None
    sampled_pool_index: Tensor


class InputBatch:
    """Slots of `max_num_seqs` requests of at most `max_model_len` tokens, on `device`."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_blocks = -(-max_model_len // block_size)
        self.device = device
        self.token_pool = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self.block_table = torch.zeros((max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)
        # Tokens that a slot holds, sampled ones that only the device knows included; 0 while it is empty.
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        # Slots whose request could not be prepared, or was planned wrongly, and why. Their rows fail until they are released.
        self.slot_errors: dict[int, str] = {}

    def release(self, slot: int) -> None:
        """Empty `slot`; it may be empty already."""
        self.num_tokens[slot] = 0
        self.slot_errors.pop(slot, None)

    def enter(self, new: NewRequest, prepare: Callable[[NewRequest], None]) -> None:
        """Let a request enter its slot; `prepare` does what else must be done for it.

        Whatever goes wrong fails this request alone: the reason is kept in `slot_errors`.
        """
        self.release(new.slot)
        try:
            self._write_request(new)
            prepare(new)
        except PagodaError as error:
            self.slot_errors[new.slot] = str(error)
        except Exception as error:
            logger.exception("request %s could not be prepared", new.request_id)
            self.slot_errors[new.slot] = f"the request could not be prepared: {type(error).__name__}: {error}"

    def append_blocks(self, plan: StepPlan) -> None:
        """Append the plan's new blocks to the block tables of their slots."""
        index: list[int] = []
        values: list[int] = []
        for slot, offset, block_ids in zip(plan.slots, plan.block_offsets, plan.new_block_ids, strict=True):
            if block_ids and self._check_blocks(slot, offset, block_ids):
                first = slot * self.max_blocks + offset
                index.extend(range(first, first + len(block_ids)))
                values.extend(block_ids)
        if index:
            table_index = upload(np.array(index, dtype=np.int64), self.device)
            block_ids_on_device = upload(np.array(values, dtype=np.int32), self.device)
            self.block_table.view(-1).index_copy_(0, table_index, block_ids_on_device)

    def build(self, plan: StepPlan) -> StepInputs | None:
        """The inputs of the plan's rows, or None if no row can run. Rows in `slot_errors` are left out."""
        slots = np.array(plan.slots, dtype=np.int64)
        computed = np.array(plan.num_computed_tokens, dtype=np.int64)
        scheduled = np.array(plan.num_scheduled_tokens, dtype=np.int64)
        samples = np.array(plan.samples, dtype=bool)
        self._check_rows(slots, computed, scheduled)
        plan_rows = np.argsort(scheduled > 1, kind="stable")
        if self.slot_errors:
            runs = [slot not in self.slot_errors for slot in plan.slots]
            plan_rows = plan_rows[np.array(runs, dtype=bool)[plan_rows]]
        if not plan_rows.size:
            return None
        return self._gather(plan_rows, slots[plan_rows], computed[plan_rows], scheduled[plan_rows], samples[plan_rows])

    def write_sampled(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Put the sampled `token_ids` int64 `[S]` where the next step will read them."""
        self.token_pool.view(-1).index_copy_(0, inputs.sampled_pool_index, token_ids)

    def _gather(
        self, plan_rows: Int64Array, slots: Int64Array, computed: Int64Array, scheduled: Int64Array, samples: np.ndarray
    ) -> StepInputs:
        """Inputs of rows in batch order."""
        query_start_loc = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(scheduled, out=query_start_loc[1:])
        num_tokens, num_decode_rows = int(query_start_loc[-1]), int((scheduled == 1).sum())
        first_tokens, seq_lens = query_start_loc[:-1], computed + scheduled
        if num_tokens == len(slots):
            token_slots, positions = slots, computed
        else:
            token_slots = np.repeat(slots, scheduled)
            positions = np.arange(num_tokens) + np.repeat(computed - first_tokens, scheduled)
        sampling_rows = samples.nonzero()[0]
        sampling_tokens = query_start_loc[1:][sampling_rows] - 1
        pool_width = self.token_pool.shape[1]
        sampled_positions = seq_lens[sampling_rows]
        self.num_tokens[slots[sampling_rows]] = sampled_positions + 1
        arrays = (
            positions,
            token_slots * pool_width + positions,
            token_slots * self.max_blocks + positions // self.block_size,
            positions % self.block_size,
            slots,
            sampling_tokens,
            slots[sampling_rows] * pool_width + sampled_positions,
        )
        positions_, pool_index, table_index, block_offsets, slots_, sampling_tokens_, sampled_pool_index = upload_all(
            arrays, self.device
        )
        max_seq_len = int(seq_lens.max())
        lengths = [query_start_loc.astype(np.int32), seq_lens.astype(np.int32)]
        query_start_loc_, seq_lens_ = upload_all(lengths, self.device)
        blocks = self.block_table.view(-1).index_select(0, table_index)
        metadata = AttentionMetadata(
            query_start_loc=query_start_loc_,
            seq_lens=seq_lens_,
            block_table=self.block_table[:, : -(-max_seq_len // self.block_size)].index_select(0, slots_),
            slot_mapping=blocks.long().mul_(self.block_size).add_(block_offsets),
            max_query_len=int(scheduled.max()),
            max_seq_len=max_seq_len,
            num_decode_rows=num_decode_rows,
        )
        return StepInputs(
            plan_rows=plan_rows,
            slots=slots,
            num_computed_tokens=computed,
            num_scheduled_tokens=scheduled,
            first_tokens=first_tokens,
            input_ids=self.token_pool.view(-1).index_select(0, pool_index),
            positions=positions_,
            metadata=metadata,
            sampling_rows=sampling_rows,
            sampling_tokens=None if len(sampling_rows) == num_tokens else sampling_tokens_,
            sampled_pool_index=sampled_pool_index,
        )

    def _write_request(self, new: NewRequest) -> None:
        """Write a request's tokens and blocks into its slot; `InvalidRequestError` says what cannot be right."""
        token_ids = np.array(new.token_ids, dtype=np.int64)
        block_ids = np.array(new.block_ids, dtype=np.int32)
        if not 0 < token_ids.size <= self.max_model_len:
            raise InvalidRequestError(f"a request has {token_ids.size} tokens; 1 to {self.max_model_len} are possible")
        if token_ids.min() < 0 or token_ids.max() >= self.vocab_size:
            outside = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)][0]
            raise InvalidRequestError(f"token id {outside} is not between 0 and {self.vocab_size - 1}")
        if block_ids.size > self.max_blocks or (
            block_ids.size and not 0 <= block_ids.min() <= block_ids.max() < self.num_blocks
        ):
            raise InvalidRequestError(f"blocks {new.block_ids} are not at most {self.max_blocks} of {self.num_blocks}")
        self.token_pool[new.slot, : token_ids.size] = upload(token_ids, self.device)
        self.block_table[new.slot, : block_ids.size] = upload(block_ids, self.device)
        self.block_table[new.slot, block_ids.size :] = 0
        self.num_tokens[new.slot] = token_ids.size

    def _check_blocks(self, slot: int, offset: int, block_ids: list[int]) -> bool:
        if offset + len(block_ids) <= self.max_blocks and min(block_ids) >= 0 and max(block_ids) < self.num_blocks:
            return True
        self.slot_errors.setdefault(slot, f"blocks {block_ids} cannot stand at {offset} of a block table")
        return False

    def _check_rows(self, slots: Int64Array, computed: Int64Array, scheduled: Int64Array) -> None:
        """Fail rows that would run tokens which their slot does not hold."""
        wrong = (computed < 0) | (scheduled < 1) | (computed + scheduled > self.num_tokens[slots])
        if wrong.any():
            for row in wrong.nonzero()[0].tolist():
                slot = int(slots[row])
                tokens = f"{scheduled[row]} tokens from position {computed[row]}"
                self.slot_errors.setdefault(slot, f"{tokens} were planned; the slot has {self.num_tokens[slot]}")
