"""The inputs of a step in one launch, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["pool_stride", "table_stride", "row_stride", "num_rows", "num_columns"],
    do_not_specialize_on_alignment=["num_computed_tokens", "query_start_loc", "positions", "slot_mapping"],
)
def gather_step_kernel(
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    row_table,
    token_pool,
    block_table,
    req_indices,
    query_start_loc,
    num_computed_tokens,
    pool_stride,
    table_stride,
    row_stride,
    num_rows,
    num_columns,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows with padding, tiles of TILE): one tile of a row's tokens, and one of its block table.

    Pointers as in `KernelBackend.gather_step`, with `pool_stride`, `table_stride` and `row_stride` elements from row to
    row of token_pool, block_table and row_table, of which `num_columns` are written.
    """
    row = tl.program_id(0)
    is_real = row < num_rows
    req_index = tl.load(req_indices + row, mask=is_real, other=0)
    computed = tl.load(num_computed_tokens + row, mask=is_real, other=0)
    last_row = tl.minimum(row, num_rows)
    # A padding row has one token, behind those of all rows and of the padding rows before it.
    first_token = tl.load(query_start_loc + last_row) + row - last_row
    num_tokens = 1
    if is_real:
        num_tokens = tl.load(query_start_loc + row + 1) - first_token
    offsets = tl.program_id(1) * TILE + tl.arange(0, TILE)

    in_row = offsets < num_tokens
    position = computed + offsets
    token = tl.load(token_pool + req_index * pool_stride + position, mask=in_row & is_real, other=0)
    table = block_table + req_index * table_stride
    block = tl.load(table + position // BLOCK_SIZE, mask=in_row & is_real, other=0).to(tl.int64)
    target = first_token + offsets
    tl.store(input_ids + target, token, mask=in_row)
    tl.store(positions + target, position, mask=in_row)
    tl.store(slot_mapping + target, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=in_row)

    in_table = offsets < num_columns
    blocks = tl.load(table + offsets, mask=in_table & is_real, other=0)
    tl.store(row_table + row.to(tl.int64) * row_stride + offsets, blocks, mask=in_table)
    if tl.program_id(1) == 0:
        tl.store(seq_lens + row, (computed + num_tokens).to(tl.int32))
