"""Low-rank adapters of a linear layer: shrink, `x @ A`, and expand, what B makes of it added to the output.

    tokens of a step, sorted by adapter      │ slot 0        │ slot 3 │ slot 7 …
    blocks of TILE_M rows, a slot each       │ 0     │ 1     │ 2      │ 3 …       -1: unused, so that the grid is fixed

Whose rows are whose, and where an adapter's weights are, is read on the device: what was captured in a graph runs for any
rows and any adapters. Sums over the inputs go by chunks of CHUNK, each in order, which are added up in order; then over the
rank, in order. Neither depends on the block that a row is in, and so its bits do not depend on its company.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lora_shrink_kernel(
    shrunk,
    x,
    adapters,
    blocks,
    order,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    RANK_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Grid (chunks of each tile of ranks, blocks): shrunk[row, chunk] = x[token of the row, chunk] @ A of its adapter."""
    block = blocks + tl.program_id(1) * 3
    slot = tl.load(block)
    if slot >= 0:
        adapter = adapters + slot * FIELDS
        num_ranks = tl.multiple_of(tl.load(adapter + 1).to(tl.int32), 16)
        chunk = tl.program_id(0) % NUM_CHUNKS
        first = tl.program_id(0) // NUM_CHUNKS * TILE_R
        if first < num_ranks:
            a = tl.multiple_of(tl.load(adapter).to(tl.pointer_type(x.dtype.element_ty)), 16)
            ranks = first + tl.arange(0, TILE_R)
            has_rank = ranks < num_ranks
            rows = tl.load(block + 1) + tl.arange(0, TILE_M)
            is_own = rows < tl.load(block + 2)
            tokens = tl.load(order + rows, mask=is_own, other=0).to(tl.int64)
            total = tl.zeros((TILE_M, TILE_R), tl.float32)
            for done in range(0, CHUNK, TILE_K):
                inputs = chunk * CHUNK + done + tl.arange(0, TILE_K)
                has_input = inputs < INPUTS
                x_values = tl.load(
                    x + tokens[:, None] * INPUTS + inputs[None, :], mask=is_own[:, None] & has_input[None, :], other=0.0
                )
                a_values = tl.load(
                    a + inputs[:, None] * num_ranks + ranks[None, :],
                    mask=has_input[:, None] & has_rank[None, :],
                    other=0.0,
                )
                total = tl.dot(x_values, a_values, total, input_precision="ieee")
            to = shrunk + (rows.to(tl.int64) * NUM_CHUNKS + chunk)[:, None] * RANK_STRIDE + ranks[None, :]
            tl.store(to, total, mask=is_own[:, None] & has_rank[None, :])


@triton.jit
def lora_expand_kernel(
    output,
    shrunk,
    weights_like,
    adapters,
    scales,
    blocks,
    order,
    OUTPUTS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    RANK_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    FIRST_PART: tl.constexpr,
    PART_FIELDS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PANEL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """Grid (tiles of columns, blocks): adds scale * (sum of the row's chunks) @ B to the output of a row's token.

    The tiles are those of the first fused layer that the adapter has something for, then those of the next. `weights_like`:
    anything of the type that A and B have.
    """
    block = blocks + tl.program_id(1) * 3
    slot = tl.load(block)
    if slot >= 0:
        adapter = adapters + slot * FIELDS
        tile = tl.program_id(0)
        chosen = -1
        first_column = 0
        for number in tl.static_range(MAX_PARTS):
            width = tl.load(adapter + FIRST_PART + number * PART_FIELDS + 4).to(tl.int32)
            num_tiles = tl.cdiv(width, TILE_N)
            is_here = (tile >= 0) & (tile < num_tiles)
            chosen = tl.where(is_here, number, chosen)
            first_column = tl.where(is_here, tile * TILE_N, first_column)
            tile = tile - num_tiles
        if chosen >= 0:
            part = adapter + FIRST_PART + chosen * PART_FIELDS
            b = tl.multiple_of(tl.load(part).to(tl.pointer_type(weights_like.dtype.element_ty)), 16)
            rank = tl.load(part + 1).to(tl.int32)
            first_rank = tl.load(part + 2).to(tl.int32)
            column = tl.load(part + 3).to(tl.int32)
            width = tl.load(part + 4).to(tl.int32)
            scale = tl.load(scales + slot * MAX_PARTS + chosen)
            rows = tl.load(block + 1) + tl.arange(0, TILE_M)
            is_own = rows < tl.load(block + 2)
            tokens = tl.load(order + rows, mask=is_own, other=0).to(tl.int64)
            columns = tl.multiple_of(first_column, TILE_N) + tl.arange(0, TILE_N)
            has_column = columns < width
            of_columns = (columns // PANEL * rank * PANEL + columns % PANEL).to(tl.int64)
            total = tl.zeros((TILE_M, TILE_N), tl.float32)
            for done in range(0, rank, TILE_R):
                ranks = done + tl.arange(0, TILE_R)
                has_rank = ranks < rank
                is_there = is_own[:, None] & has_rank[None, :]
                sums = tl.zeros((TILE_M, TILE_R), tl.float32)
                of_row = (
                    shrunk + rows.to(tl.int64)[:, None] * (NUM_CHUNKS * RANK_STRIDE) + (first_rank + ranks)[None, :]
                )
                for chunk in range(NUM_CHUNKS):
                    sums += tl.load(of_row + chunk * RANK_STRIDE, mask=is_there, other=0.0)
                b_values = tl.load(
                    b + of_columns[None, :] + ranks[:, None] * PANEL,
                    mask=has_rank[:, None] & has_column[None, :],
                    other=0.0,
                )
                total = tl.dot(sums * scale, b_values.to(tl.float32), total, input_precision="tf32x3")
            to = output + tokens[:, None] * OUTPUTS + (column + columns)[None, :]
            wanted = is_own[:, None] & has_column[None, :]
            before = tl.load(to, mask=wanted, other=0.0).to(tl.float32)
            tl.store(to, (before + total).to(output.dtype.element_ty), mask=wanted)
