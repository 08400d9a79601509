"""The inputs of a step against loops over rows and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.execution.input_batch import InputBatch
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NewBlocks, NewRequest, StepPlan
from tests.support.kernel_backends import reference_kernels

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

MAX_NUM_SEQS, MAX_MODEL_LEN, VOCAB_SIZE, NUM_BLOCKS = 5, 40, 1000, 64


@dataclass
class Held:
    """What a request slot must hold."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


def spec_of(req_index: int, prompt_token_ids: list[int]) -> EngineRequest:
    return EngineRequest(
        request_id=str(req_index), params=SamplingParams(), prompt_token_ids=prompt_token_ids, max_tokens=MAX_MODEL_LEN
    )


def make_batch(block_size: int) -> InputBatch:
    return InputBatch(
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        block_size=block_size,
        num_blocks=NUM_BLOCKS,
        device=torch.device("cpu"),
    )


def random_plan(random: np.random.Generator, step_id: int, req_indices: dict[int, Held], block_size: int) -> StepPlan:
    """Some requests leave, some enter, some run; `req_indices` becomes what the request slots must hold then."""
    plan = StepPlan(step_id)
    for req_index in list(req_indices):
        if random.random() < 0.2 or len(req_indices[req_index].tokens) >= MAX_MODEL_LEN:
            plan.released_req_indices.append(req_index)
            del req_indices[req_index]
    entering = [
        req_index for req_index in range(MAX_NUM_SEQS) if req_index not in req_indices and random.random() < 0.5
    ]
    for req_index in random.permutation([*req_indices, *entering]).tolist():
        is_new = req_index in entering
        if is_new:
            req_indices[req_index] = Held(
                random.integers(0, VOCAB_SIZE, random.integers(1, MAX_MODEL_LEN - 2)).tolist()
            )
        held = req_indices[req_index]
        if random.random() < 0.3 and not is_new:
            continue
        count = int(random.integers(1, len(held.tokens) - held.num_computed + 1))
        offset = len(held.blocks)
        missing = -(-(held.num_computed + count) // block_size) - offset
        new_blocks = random.integers(1, NUM_BLOCKS, max(0, missing)).tolist()
        held.blocks += new_blocks
        if is_new:
            plan.new_requests.append(
                NewRequest(req_index, spec_of(req_index, held.tokens[:1]), held.tokens[1:], [list(held.blocks)], 0)
            )
            offset, new_blocks = len(held.blocks), []
        plan.request_ids.append(str(req_index))
        plan.req_indices.append(req_index)
        plan.num_computed_tokens.append(held.num_computed)
        plan.num_scheduled_tokens.append(count)
        if new_blocks:
            plan.new_blocks.append(NewBlocks(req_index, 0, offset, new_blocks))
        held.num_computed += count
        plan.samples.append(held.num_computed == len(held.tokens))
    return plan


def check(batch: InputBatch, plan: StepPlan, req_indices: dict[int, Held], block_size: int) -> list[int]:
    """Hold the inputs of a plan against what they must be; returns the plan's rows that sample, in batch order."""
    for req_index in plan.released_req_indices:
        batch.release(req_index)
    for new in plan.new_requests:
        batch.enter(new, lambda _: None)
    batch.append_blocks(plan)
    inputs = batch.build(plan)
    if not plan.req_indices:
        assert inputs is None
        return []
    order = sorted(range(len(plan.req_indices)), key=lambda row: plan.num_scheduled_tokens[row] > 1)
    tokens, positions, mapping, starts, sampling = [], [], [], [0], []
    for row in order:
        held = req_indices[plan.req_indices[row]]
        for position in range(held.num_computed - plan.num_scheduled_tokens[row], held.num_computed):
            tokens.append(held.tokens[position])
            positions.append(position)
            mapping.append(held.blocks[position // block_size] * block_size + position % block_size)
        starts.append(len(tokens))
        if plan.samples[row]:
            sampling.append(row)
    (metadata,), layout = inputs.metadata(), inputs.layout
    lengths = [req_indices[plan.req_indices[row]].num_computed for row in order]
    assert layout.plan_rows.tolist() == order
    assert inputs.tensors[0].input_ids.tolist() == tokens
    assert inputs.tensors[0].positions.tolist() == positions
    assert metadata.slot_mapping.tolist() == mapping
    assert metadata.query_start_loc.tolist() == starts
    assert metadata.seq_lens.tolist() == lengths
    assert metadata.max_seq_len == max(lengths)
    assert metadata.max_query_len == max(plan.num_scheduled_tokens)
    assert metadata.num_decode_rows == plan.num_scheduled_tokens.count(1)
    assert metadata.block_table.shape == (len(order), -(-max(lengths) // block_size))
    for row, table in zip(order, metadata.block_table.tolist(), strict=True):
        blocks = req_indices[plan.req_indices[row]].blocks[: len(table)]
        assert table == blocks + [0] * (len(table) - len(blocks))
    assert (metadata.slot_mapping.dtype, metadata.block_table.dtype) == (torch.int64, torch.int32)
    last_tokens = [starts[order.index(row) + 1] - 1 for row in sampling]
    found = layout.sampling_tokens
    assert (list(range(len(tokens))) if found is None else found.tolist()) == last_tokens
    sampled = torch.arange(len(sampling)) + step_token(plan.step_id)
    batch.write_sampled(inputs, sampled)
    for row, token in zip(sampling, sampled.tolist(), strict=True):
        req_indices[plan.req_indices[row]].tokens.append(token)
    return sampling


def step_token(step_id: int) -> int:
    return 20 * step_id % (VOCAB_SIZE - MAX_NUM_SEQS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 16]))
def test_step_inputs_are_what_loops_over_rows_and_tokens_would_make_them(seed, block_size):
    random = np.random.default_rng(seed)
    batch, req_indices = make_batch(block_size), {}
    for step_id in range(12):
        check(batch, random_plan(random, step_id, req_indices, block_size), req_indices, block_size)


def test_layout_is_kept_while_the_same_rows_decode_and_made_again_when_they_change():
    batch = make_batch(4)
    req_indices = {req_index: Held([req_index + 1] * 3) for req_index in range(3)}
    prefill = StepPlan(
        0, req_indices=[0, 1, 2], num_computed_tokens=[0] * 3, num_scheduled_tokens=[3] * 3, samples=[True] * 3
    )
    prefill.new_requests = [
        NewRequest(req_index, spec_of(req_index, held.tokens), [], [[req_index + 1, req_index + 9]], 0)
        for req_index, held in req_indices.items()
    ]
    for new in prefill.new_requests:
        batch.enter(new, lambda _: None)
    first = batch.build(prefill)

    def decode(rows: list[int], computed: int) -> StepPlan:
        return StepPlan(
            computed,
            req_indices=rows,
            num_computed_tokens=[computed] * len(rows),
            num_scheduled_tokens=[1] * len(rows),
            samples=[True] * len(rows),
        )

    second, third = batch.build(decode([0, 1, 2], 3)), batch.build(decode([0, 1, 2], 4))
    assert first.layout is not second.layout
    assert second.layout is third.layout
    assert third.tensors[0].positions.tolist() == [4, 4, 4]
    assert third.tensors[0].slot_mapping.tolist() == [36, 40, 44]
    assert batch.build(decode([0, 2], 5)).layout is not third.layout
    assert batch.build(decode([0, 2], 9)) is None  # tokens nobody knows
    assert set(batch.request_errors) == {0, 2}
