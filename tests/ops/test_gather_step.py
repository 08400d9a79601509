"""The inputs of a step against loops over rows and tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import StepTensors

NUM_SLOTS, LENGTH, NULL = 6, 50, -7


def expected(
    pool: torch.Tensor, table: torch.Tensor, block_size: int, rows: list[tuple[int, int, int]], padding: int
) -> dict[str, list[int]]:
    """Rows are (request slot, tokens computed, tokens to compute)."""
    found: dict[str, list[int]] = {name: [] for name in ("input_ids", "positions", "slot_mapping", "seq_lens")}
    for req_index, computed, count in rows:
        for position in range(computed, computed + count):
            found["input_ids"].append(int(pool[req_index, position]))
            found["positions"].append(position)
            block = int(table[req_index, position // block_size])
            found["slot_mapping"].append(block * block_size + position % block_size)
        found["seq_lens"].append(computed + count)
    for name, value in (("input_ids", 0), ("positions", 0), ("slot_mapping", 0), ("seq_lens", 1)):
        found[name] += [value] * padding
    return found


def check(kernels: KernelBackend, rows: list[tuple[int, int, int]], block_size: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-LENGTH // block_size)
    pool = torch.randint(0, 1000, (NUM_SLOTS, LENGTH), generator=generator)
    table = torch.randint(1, 99, (NUM_SLOTS, num_blocks), generator=generator, dtype=torch.int32)
    counts = [count for _, _, count in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    columns = -(-max(computed + count for _, computed, count in rows) // block_size)
    # One column more than is to be written: it must be left alone.
    room = StepTensors.allocate(sum(counts) + padding, len(rows) + padding, columns + 1, pool.device)
    room.block_table.fill_(NULL)
    into = StepTensors(
        input_ids=room.input_ids,
        positions=room.positions,
        slot_mapping=room.slot_mapping,
        seq_lens=room.seq_lens,
        block_table=room.block_table[:, :columns],
    )
    req_indices = torch.tensor([req_index for req_index, _, _ in rows])
    computed_tokens = torch.tensor([computed for _, computed, _ in rows])
    kernels.gather_step(pool, table, block_size, req_indices, starts, computed_tokens, max(counts), into)
    for name, values in expected(pool, table, block_size, rows, padding).items():
        assert getattr(into, name).tolist() == values, name
    assert torch.equal(into.block_table[: len(rows)], table[req_indices, :columns])
    assert not into.block_table[len(rows) :].any()
    assert (room.block_table[:, columns] == NULL).all()


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    req_indices = draw(st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=NUM_SLOTS, unique=True))
    rows = []
    for req_index in req_indices:
        computed = draw(st.integers(0, LENGTH - 1))
        rows.append((req_index, computed, draw(st.integers(1, LENGTH - computed))))
    return rows


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([1, 4, 16]), st.integers(0, 3), st.integers(0, 2**16))
def test_every_row_gets_its_own_tokens_places_and_blocks(kernels, rows, block_size, padding, seed) -> None:
    check(kernels, rows, block_size, padding, seed)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_decode_rows_take_their_last_token_and_padding_has_only_the_null_block(
    kernels: KernelBackend, padding: int
) -> None:
    check(kernels, [(req_index, 7 * req_index + 3, 1) for req_index in (4, 0, 2)], 4, padding, seed=1)


def test_prompts_longer_than_a_tile(kernels: KernelBackend) -> None:
    """A launch on a GPU looks at 1024 tokens at a time."""
    pool = torch.arange(2 * 3000).view(2, 3000)
    table = torch.arange(2 * 188, dtype=torch.int32).view(2, 188) + 1
    into = StepTensors.allocate(2500 + 1, 2, 188, pool.device)
    starts = torch.tensor([0, 2500, 2501], dtype=torch.int32)
    kernels.gather_step(pool, table, 16, torch.tensor([1, 0]), starts, torch.tensor([400, 2999]), 2500, into)
    assert torch.equal(into.input_ids, torch.cat([pool[1, 400:2900], pool[0, 2999:]]))
    assert torch.equal(into.positions, torch.cat([torch.arange(400, 2900), torch.tensor([2999])]))
    assert into.seq_lens.tolist() == [2900, 3000]
    assert torch.equal(into.block_table, table.flip(0))
