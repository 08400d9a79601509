"""Mixtures of experts: grouped products over token blocks, each of which has rows of one expert.

    pairs (token, choice), sorted by expert      │ expert 0      │ expert 2 │ expert 5 …
    blocks of TILE_M rows                        │ 0     │ 1     │ 2        │ 3 …       -1: unused, so that the grid is fixed

The reduction over inputs goes in tiles of TILE_K from the first to the last, whatever a row's block holds besides it, and a
token's experts are summed in the order of its choice: a row's bits do not depend on its company.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda_kernels.gpu.elementwise_kernels import gated_activation


@triton.jit
def _block_rows(expert_of_block, first_block, first_row, block, TILE_M: tl.constexpr):
    """The expert of a block, its rows among the sorted pairs, and which of these are its own."""
    expert = tl.load(expert_of_block + block)
    exists = expert >= 0
    safe = tl.where(exists, expert, 0)
    start = tl.load(first_row + safe) + (block - tl.load(first_block + safe)) * TILE_M
    rows = start + tl.arange(0, TILE_M)
    return safe.to(tl.int64), exists, rows, (rows < tl.load(first_row + safe + 1)) & exists


@triton.jit
def expert_gate_up_kernel(
    output,
    x,
    weight,
    bias,
    order,
    expert_of_block,
    first_block,
    first_row,
    x_stride,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Grid (tiles of SIZE, blocks): output[row] = activation of both halves of weight[expert] @ x[token of the row]."""
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    expert, exists, rows, is_own = _block_rows(expert_of_block, first_block, first_row, tl.program_id(1), TILE_M)
    if exists:
        tokens = (tl.load(order + rows, mask=is_own, other=0) // TOP_K).to(tl.int64)
        has_column = columns < SIZE
        inputs = tl.arange(0, TILE_K)
        x_tile = x + tokens[:, None] * x_stride + inputs[None, :]
        gate_tile = weight + expert * (2 * SIZE * INPUTS) + columns[None, :] * INPUTS + inputs[:, None]
        up_tile = gate_tile + SIZE * INPUTS
        gate = tl.zeros((TILE_M, TILE_N), tl.float32)
        up = tl.zeros((TILE_M, TILE_N), tl.float32)
        for first in range(0, INPUTS, TILE_K):
            has_input = inputs < INPUTS - first
            x_values = tl.load(x_tile + first, mask=is_own[:, None] & has_input[None, :], other=0.0)
            wanted = has_input[:, None] & has_column[None, :]
            gate = tl.dot(x_values, tl.load(gate_tile + first, mask=wanted, other=0.0), gate, input_precision="ieee")
            up = tl.dot(x_values, tl.load(up_tile + first, mask=wanted, other=0.0), up, input_precision="ieee")
        if HAS_BIAS:
            bias_tile = bias + expert * (2 * SIZE) + columns
            gate += tl.load(bias_tile, mask=has_column, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_tile + SIZE, mask=has_column, other=0.0).to(tl.float32)[None, :]
        dtype = output.dtype.element_ty
        activated = gated_activation(gate.to(dtype), up.to(dtype), ACTIVATION)
        to = output + rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        tl.store(to, activated, mask=is_own[:, None] & has_column[None, :])


@triton.jit
def expert_down_kernel(
    output,
    x,
    weight,
    bias,
    order,
    expert_of_block,
    first_block,
    first_row,
    INPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Grid (tiles of SIZE, blocks): output[pair of the row] = weight[expert] @ x[row], in float32."""
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    expert, exists, rows, is_own = _block_rows(expert_of_block, first_block, first_row, tl.program_id(1), TILE_M)
    if exists:
        pairs = tl.load(order + rows, mask=is_own, other=0).to(tl.int64)
        has_column = columns < SIZE
        inputs = tl.arange(0, TILE_K)
        x_tile = x + rows.to(tl.int64)[:, None] * INPUTS + inputs[None, :]
        weight_tile = weight + expert * (SIZE * INPUTS) + columns[None, :] * INPUTS + inputs[:, None]
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for first in range(0, INPUTS, TILE_K):
            has_input = inputs < INPUTS - first
            x_values = tl.load(x_tile + first, mask=is_own[:, None] & has_input[None, :], other=0.0)
            wanted = has_input[:, None] & has_column[None, :]
            values = tl.load(weight_tile + first, mask=wanted, other=0.0)
            total = tl.dot(x_values, values, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + expert * SIZE + columns, mask=has_column, other=0.0).to(tl.float32)[None, :]
        tl.store(output + pairs[:, None] * SIZE + columns[None, :], total, mask=is_own[:, None] & has_column[None, :])


@triton.jit
def combine_experts_kernel(
    output,
    x,
    ids,
    weights,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (tokens, tiles of SIZE): output[token] = sum of weights[token, choice] * x[token, choice] over its choices, in
    their order, of experts `first_expert` to `first_expert + num_experts - 1`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    has_column = columns < SIZE
    total = tl.zeros((TILE,), tl.float32)
    for choice in range(TOP_K):
        expert = tl.load(ids + token * TOP_K + choice) - first_expert
        if (expert >= 0) & (expert < num_experts):
            weight = tl.load(weights + token * TOP_K + choice)
            total += weight * tl.load(x + (token * TOP_K + choice) * SIZE + columns, mask=has_column, other=0.0)
    tl.store(output + token * SIZE + columns, total, mask=has_column)
