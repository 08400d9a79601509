"""The state of the requests in the request slots on the device, and the inputs of a step made from it.

    token_pool  [max_num_seqs, max_model_len + 1]      block_tables[g]  [max_num_seqs, max_blocks]
  req_index 0 │ prompt and output of a request …     req_index 0      │ its blocks in group g, in order, then 0 …
            1 │ …                                              1      │ …

All are allocated once. A plan holds what changed; everything else of a step is gathered from here by index, so building a
step costs the same at any context length. A sampled token is written into the pool on the device, at the position after the
last one computed: the next step can be built, and given to the device, before the host has seen it. Drafts are written where
they would stand; what is sampled at their positions replaces them, and what stands behind the last accepted one is never read,
for the next step writes there first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pagoda.errors import PagodaError
from pagoda.sampling.rows import Int64Array
from pagoda.sampling.transfer import all_to_device, to_device
from pagoda.scheduling.plan import NewRequest, SampledTokensUpdate, StepPlan
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata, StepTensors

logger = logging.getLogger(__name__)

_MOST_LAYOUTS = 4
_LayoutKey = tuple[list[int], list[int], list[bool], dict[int, int], list[int]]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Which rows run how many tokens: R rows, T tokens, S outputs. While it stays the same it is not made again.

    Rows are in batch order: those with one token first, then those with few. An output is a position whose next token is
    sampled: the last token of a row that samples, and with k drafts the k tokens before it too. A row's outputs follow each
    other, by position.

    On the host, int64: of each row its index in the plan (`plan_rows`), its request slot, its number of tokens and the index
    of its first token in the batch, `[R]`; of each output its row, that row's index in the plan and request slot, the number
    of its row's tokens behind it (`sampled_behind`), and where its request slot begins in the flattened token pool
    (`sampled_offsets`), `[S]`. On the device: `query_start_loc` int32 `[R + 1]`, `req_indices_on_device` int64 `[R]`, and
    `sampling_tokens` int64 `[S]`, the tokens of the outputs, or None if these are all tokens in order.
    """

    plan_rows: Int64Array
    req_indices: Int64Array
    num_scheduled_tokens: Int64Array
    first_tokens: Int64Array
    sampling_rows: Int64Array
    sampling_plan_rows: list[int]
    sampling_req_indices: Int64Array
    sampled_behind: Int64Array
    sampled_offsets: Int64Array
    query_start_loc: Tensor
    req_indices_on_device: Tensor
    sampling_tokens: Tensor | None
    num_tokens: int
    max_query_len: int
    num_decode_rows: int
    num_short_rows: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The batch of one step, in the order of its layout.

    `num_computed_tokens` int64 `[R]` and `sampled_positions` int64 `[S]` are on the host. On the device: `tensors`, for each
    group of layers, which differ in block tables and slot mappings only, with padding behind the rows where `StepBuffers`
    have it; `sampled_pool_index` int64 `[S]`, where sampled tokens belong in the flattened token pool.
    """

    layout: RowLayout
    num_computed_tokens: Int64Array
    sampled_positions: Int64Array
    tensors: Sequence[StepTensors]
    block_size: int
    max_seq_len: int
    sampled_pool_index: Tensor

    def metadata(self) -> list[AttentionMetadata]:
        """What attention must know of the step, whose tensors have no padding, for each group of layers."""
        return [
            AttentionMetadata(
                query_start_loc=self.layout.query_start_loc,
                seq_lens=tensors.seq_lens,
                block_table=tensors.block_table,
                slot_mapping=tensors.slot_mapping,
                max_query_len=self.layout.max_query_len,
                max_seq_len=self.max_seq_len,
                num_decode_rows=self.layout.num_decode_rows,
                num_short_rows=self.layout.num_short_rows,
                block_size=self.block_size,
            )
            for tensors in self.tensors
        ]


class StepBuffers(Protocol):
    """Tensors at fixed addresses for the inputs of some steps."""

    def tensors_for(self, layout: RowLayout, num_columns: int) -> Sequence[StepTensors] | None:
        """Where the inputs of such rows with so many columns of block table go, for each group of layers; None: into new
        tensors."""


class InputBatch:
    """Request slots of `max_num_seqs` requests of at most `max_model_len` tokens, on `device`."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
        num_groups: int = 1,
        short_query_len: int = 1,
        max_short_rows: int = 0,
    ) -> None:
        """`num_groups`: of layers, see `kv_groups`. `short_query_len` and `max_short_rows`: see `KernelBackend`."""
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_groups = num_groups
        self._short_query_len = short_query_len
        self._max_short_rows = max_short_rows
        self.max_blocks = -(-max_model_len // block_size)
        self.device = device
        self.token_pool = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self._all_tables = torch.zeros((num_groups, max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)
        self.block_tables = self._all_tables.unbind()
        # Tokens that a request slot holds, including sampled ones that are not on the host yet; 0 while it is empty.
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        # Request slots whose rows fail until they are released, and why. Those that were planned wrongly do not run. The
        # others do, and even sample a token that is dropped: what runs must follow from the plan alone, or ranks would
        # disagree on the shapes that they exchange.
        self.request_errors: dict[int, str] = {}
        self._cannot_run: set[int] = set()
        # Of the last plans, the newest first: a draft model's passes are between the steps of the model.
        self._layouts: list[tuple[_LayoutKey, RowLayout | None]] = []

    def release(self, req_index: int) -> None:
        """Empty `req_index`; it may be empty already."""
        self.num_tokens[req_index] = 0
        self.request_errors.pop(req_index, None)
        self._cannot_run.discard(req_index)

    def enter(self, new: NewRequest, prepare: Callable[[NewRequest], None]) -> None:
        """Let a request enter its request slot; `prepare` does what else must be done before it can sample.

        Whatever goes wrong with it in `prepare` fails this request alone: the reason is kept in `request_errors`. What goes
        wrong while its tokens and blocks are written, such as that there is no memory, is not about this request and is
        raised: the row runs on the other ranks, and others share the blocks that it fills.
        """
        self.release(new.req_index)
        self._cannot_run.add(new.req_index)  # until it is written, and if it cannot be
        if not all(self._check_blocks(new.req_index, 0, block_ids) for block_ids in new.block_ids):
            return
        self._write_request(new)
        self._cannot_run.discard(new.req_index)
        try:
            prepare(new)
        except PagodaError as error:
            self.request_errors[new.req_index] = str(error)
        except Exception as error:  # an error in one request fails that request, not the step
            logger.exception("request %s could not be prepared", new.spec.request_id)
            self.request_errors[new.req_index] = f"the request could not be prepared: {type(error).__name__}: {error}"

    def apply_update(self, update: SampledTokensUpdate) -> None:
        """Write tokens that another rank sampled into the pool, at planned request slots and positions."""
        if update.req_indices:
            req_indices, positions, token_ids = (
                to_device(np.array(values, dtype=np.int64), self.device)
                for values in (update.req_indices, update.positions, update.token_ids)
            )
            self.token_pool[req_indices, positions] = token_ids

    def append_blocks(self, plan: StepPlan) -> None:
        """Append the plan's new blocks to the block tables of their request slots."""
        if not plan.new_blocks:
            return
        index: list[int] = []
        values: list[int] = []
        for new in plan.new_blocks:
            if new.req_index not in self._cannot_run and self._check_blocks(new.req_index, new.offset, new.block_ids):
                first = (new.group * len(self.num_tokens) + new.req_index) * self.max_blocks + new.offset
                index.extend(range(first, first + len(new.block_ids)))
                values.extend(new.block_ids)
        table_index = to_device(np.array(index, dtype=np.int64), self.device)
        block_ids_on_device = to_device(np.array(values, dtype=np.int32), self.device)
        self._all_tables.view(-1).index_copy_(0, table_index, block_ids_on_device)

    def build(self, plan: StepPlan, buffers: StepBuffers | None = None) -> StepInputs | None:
        """The inputs of the plan's rows, in `buffers` where these have a place for them; None if no row can run."""
        computed = np.array(plan.num_computed_tokens, dtype=np.int64)
        if plan.draft_token_ids:
            self._write_drafts(plan)
        layout = self._layout_of(plan)
        if layout is not None and self._fail_wrong_rows(layout, computed):
            layout = self._layout_of(plan)
        if layout is None:
            return None
        computed = computed[layout.plan_rows]
        seq_lens = computed + layout.num_scheduled_tokens
        sampled_positions = seq_lens[layout.sampling_rows] - layout.sampled_behind
        # Of several outputs of a request slot the last one counts, which is the farthest.
        self.num_tokens[layout.sampling_req_indices] = sampled_positions + 1
        max_seq_len = int(seq_lens.max())
        num_columns = -(-max_seq_len // self.block_size)
        computed_, sampled_pool_index = all_to_device(
            (computed, layout.sampled_offsets + sampled_positions), self.device
        )
        tensors = buffers.tensors_for(layout, num_columns) if buffers is not None else None
        if tensors is None:
            tensors = StepTensors.allocate_groups(
                self.num_groups, layout.num_tokens, len(layout.req_indices), num_columns, self.device
            )
        for block_table, of_group in zip(self.block_tables, tensors, strict=True):
            backend.active.gather_step(
                self.token_pool,
                block_table,
                self.block_size,
                layout.req_indices_on_device,
                layout.query_start_loc,
                computed_,
                layout.max_query_len,
                of_group,
            )
        return StepInputs(
            layout, computed, sampled_positions, tensors, self.block_size, max_seq_len, sampled_pool_index
        )

    def write_sampled(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Put the sampled `token_ids` int64 `[S]` where the next step will read them."""
        self.token_pool.view(-1).index_copy_(0, inputs.sampled_pool_index, token_ids)

    def _write_drafts(self, plan: StepPlan) -> None:
        """Write the plan's drafts into the pool, each behind the tokens that its request slot holds."""
        index: list[int] = []
        values: list[int] = []
        for row, drafts in plan.draft_token_ids.items():
            req_index, end = plan.req_indices[row], plan.num_computed_tokens[row] + plan.num_scheduled_tokens[row]
            first = end - len(drafts)
            if req_index in self._cannot_run or first > self.num_tokens[req_index] or end > self.max_model_len:
                continue  # planned wrongly: `_fail_wrong_rows` finds it
            self.num_tokens[req_index] = end
            begin = req_index * self.token_pool.shape[1] + first
            index.extend(range(begin, begin + len(drafts)))
            values.extend(drafts)
        positions, token_ids = (to_device(np.array(each, dtype=np.int64), self.device) for each in (index, values))
        self.token_pool.view(-1).index_copy_(0, positions, token_ids)

    def _layout_of(self, plan: StepPlan) -> RowLayout | None:
        """The layout of the plan's rows without those that cannot run; None if none can. An earlier one, if it fits again."""
        blocked = sorted(self._cannot_run)
        num_drafts = {row: len(drafts) for row, drafts in plan.draft_token_ids.items()}
        key = (plan.req_indices, plan.num_scheduled_tokens, plan.samples, num_drafts, blocked)
        layouts = self._layouts
        for place, (known, layout) in enumerate(layouts):
            if known == key:
                if place:
                    layouts.insert(0, layouts.pop(place))
                return layout
        rows = [row for row, req_index in enumerate(plan.req_indices) if req_index not in self._cannot_run]
        rows.sort(key=lambda row: self._kind_of_row(plan.num_scheduled_tokens[row]))
        layout = self._make_layout(plan, rows) if rows else None
        layouts.insert(0, (key, layout))
        del layouts[_MOST_LAYOUTS:]
        return layout

    def _kind_of_row(self, num_tokens: int) -> int:
        """0: decode, 1: short, 2: any other. Rows of a kind go to attention together, in this order."""
        return (num_tokens > 1) + (num_tokens > self._short_query_len)

    def _make_layout(self, plan: StepPlan, rows: list[int]) -> RowLayout:
        """The layout of these rows of the plan, in this order."""
        req_indices = np.array([plan.req_indices[row] for row in rows], dtype=np.int64)
        scheduled = np.array([plan.num_scheduled_tokens[row] for row in rows], dtype=np.int64)
        samples = np.array([plan.samples[row] for row in rows], dtype=bool)
        if scheduled.min() < 1:
            raise ValueError(f"every row of a plan runs at least one token, not {plan.num_scheduled_tokens}")
        query_start_loc = np.zeros(len(req_indices) + 1, dtype=np.int64)
        np.cumsum(scheduled, out=query_start_loc[1:])
        first_tokens, num_tokens = query_start_loc[:-1], int(query_start_loc[-1])
        sampling_rows = samples.nonzero()[0]
        sampled_behind = np.zeros_like(sampling_rows)
        if plan.draft_token_ids:
            num_outputs = np.array(
                [1 + len(plan.draft_token_ids.get(rows[row], ())) for row in sampling_rows.tolist()], dtype=np.int64
            )
            sampling_rows = sampling_rows.repeat(num_outputs)
            sampled_behind = num_outputs.cumsum().repeat(num_outputs) - np.arange(len(sampling_rows)) - 1
        sampling_tokens = query_start_loc[1:][sampling_rows] - 1 - sampled_behind
        return RowLayout(
            plan_rows=np.array(rows, dtype=np.int64),
            req_indices=req_indices,
            num_scheduled_tokens=scheduled,
            first_tokens=first_tokens,
            sampling_rows=sampling_rows,
            sampling_plan_rows=[rows[index] for index in sampling_rows],
            sampling_req_indices=req_indices[sampling_rows],
            sampled_behind=sampled_behind,
            sampled_offsets=req_indices[sampling_rows] * self.token_pool.shape[1],
            query_start_loc=to_device(query_start_loc.astype(np.int32), self.device),
            req_indices_on_device=to_device(req_indices, self.device),
            sampling_tokens=None if len(sampling_rows) == num_tokens else to_device(sampling_tokens, self.device),
            num_tokens=num_tokens,
            max_query_len=int(scheduled.max()),
            num_decode_rows=int((scheduled == 1).sum()),
            num_short_rows=min(
                int(((scheduled > 1) & (scheduled <= self._short_query_len)).sum()), self._max_short_rows
            ),
        )

    def _fail_wrong_rows(self, layout: RowLayout, computed: Int64Array) -> bool:
        """Fail rows that would run tokens which their request slot does not hold; whether there are any."""
        begins, counts = computed[layout.plan_rows], layout.num_scheduled_tokens
        wrong = (begins < 0) | (begins + counts > self.num_tokens[layout.req_indices])
        if not wrong.any():
            return False
        for row in wrong.nonzero()[0].tolist():
            req_index = int(layout.req_indices[row])
            tokens = f"{counts[row]} tokens from position {begins[row]}"
            self.request_errors.setdefault(
                req_index, f"{tokens} were planned; the request slot has {self.num_tokens[req_index]}"
            )
            self._cannot_run.add(req_index)
        return True

    def _write_request(self, new: NewRequest) -> None:
        """Write a request's tokens and blocks into its request slot. Its prompt was checked at the border of the engine."""
        token_ids = np.array(new.token_ids, dtype=np.int64)
        self.token_pool[new.req_index, : token_ids.size] = to_device(token_ids, self.device)
        for table, block_ids in zip(self.block_tables, new.block_ids, strict=False):  # none where nothing is kept
            table[new.req_index, : len(block_ids)] = to_device(np.array(block_ids, dtype=np.int32), self.device)
            table[new.req_index, len(block_ids) :] = 0
        self.num_tokens[new.req_index] = token_ids.size

    def _check_blocks(self, req_index: int, offset: int, block_ids: list[int]) -> bool:
        """Whether these blocks exist and fit there; if not, the row does not run, on any rank."""
        ids_exist = min(block_ids, default=0) >= 0 and max(block_ids, default=0) < self.num_blocks
        if ids_exist and offset + len(block_ids) <= self.max_blocks:
            return True
        self.request_errors.setdefault(req_index, f"blocks {block_ids} do not fit at offset {offset} of a block table")
        self._cannot_run.add(req_index)
        return False
