"""Attention over paged latent vectors in Triton: multi-head latent attention in its absorbed form (DeepSeek-V2, 2024).

All heads of a layer read the same vector of a token: RANK numbers that are keys and values, and ROPE_DIM that are only keys.
So a tile of them is loaded once for the scores and for the weighted sum, where `paged_attention_kernel` would load it twice
and pad RANK + ROPE_DIM to a power of two. Query rows, tiles of keys, segments and softmax are as there, but that heads are
spread over programs where a tile has no place for all of them:

    decode,  H = 128, ROWS = 16    the row's only token: heads 0 … 15 │ heads 16 … 31 in another program │ …
    prefill, H = 16,  ROWS = 64    token 0: heads 0 … 15 │ token 1 │ token 2 │ token 3
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda_kernels.gpu.attention_kernels import (
    LOG2_E,
    NEGATIVE_INFINITY,
    block_numbers,
    blocks_in_context,
    first_tile_of,
    fold_scores,
    is_in_context,
    normalized,
    num_segments_of,
    row_of_tile,
    slots_in_block,
)


@triton.jit
def _attend_tile(
    weighted,
    row_max,
    row_sum,
    latent_queries,
    rope_queries,
    cache,
    blocks,
    start,
    last_key,
    positions,
    log2_scale,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Fold the latents `start .. start + TILE - 1`, which are in `blocks`, into the running softmax.

    MASKED: some query may not see some of them. SINGLE: all rows are of one token.
    """
    ranks = tl.arange(0, PADDED_RANK)
    ropes = tl.arange(0, PADDED_ROPE)
    # Slots outside the context may hold anything, NaN too: they are never loaded.
    loaded = tl.full([TILE, 1], True, tl.int1)
    if MASKED:
        in_context = is_in_context(start, 0, last_key, TILE, 0)
        loaded = in_context[:, None]
    slots = blocks.to(tl.int64) * BLOCK_SIZE + slots_in_block(start, BLOCK_SIZE, TILE)
    vectors = cache + (slots * (RANK + ROPE_DIM))[:, None]
    latents = tl.load(vectors + ranks[None, :], mask=loaded & (ranks < RANK)[None, :], other=0.0)
    ropes_at = vectors + RANK + ropes[None, :]
    rotated = tl.load(ropes_at, mask=loaded & (ropes < ROPE_DIM)[None, :], other=0.0)
    scores = tl.dot(latent_queries, tl.trans(latents), input_precision="ieee")
    scores = tl.dot(rope_queries, tl.trans(rotated), scores, input_precision="ieee")
    if MASKED:
        if SINGLE:  # the only token sees every key of the context
            visible = in_context[None, :]
        else:
            visible = tl.arange(0, TILE)[None, :] <= (positions - start)[:, None]
        scores = tl.where(visible, scores, NEGATIVE_INFINITY)
    weights, shrink, row_max, row_sum = fold_scores(scores, row_max, row_sum, log2_scale, MASKED, SINGLE)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(weights.to(latents.dtype), latents, weighted, input_precision="ieee")
    return weighted, row_max, row_sum


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def latent_attention_kernel(
    output,
    partial_output,
    partial_max,
    partial_sum,
    query,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    first_row,
    num_rows,
    scale,
    table_stride,
    NUM_HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Decode: grid (rows, groups of TILE_HEADS heads, programs that share a row's segments), up to QUERY_LEN tokens a row, all
    in one tile; with QUERY_LEN 1 exactly one. Prefill: grid (query tiles, groups of heads).

    Pointers: query [T, NUM_HEADS, RANK + ROPE_DIM], output [T, NUM_HEADS, RANK], cache [blocks, BLOCK_SIZE, RANK + ROPE_DIM]
    of the query's type; the others as in `paged_attention_kernel`, with RANK for its HEAD_DIM.
    """
    TOKENS_PER_TILE: tl.constexpr = ROWS // TILE_HEADS
    LATENT_DIM: tl.constexpr = RANK + ROPE_DIM
    if DECODE:
        row = first_row + tl.program_id(0)
        token = tl.load(query_start_loc + row)
        num_tokens = 1
        if QUERY_LEN > 1:
            num_tokens = tl.load(query_start_loc + row + 1) - token
        tile_token = 0
    else:
        first_token = tl.load(query_start_loc + first_row)
        row = row_of_tile(query_start_loc, first_row, first_token, num_rows, tl.program_id(0), TOKENS_PER_TILE)
        token = tl.load(query_start_loc + row)
        num_tokens = tl.load(query_start_loc + row + 1) - token
        tile_in_row = tl.program_id(0) - first_tile_of(query_start_loc, row, first_row, first_token, TOKENS_PER_TILE)
        num_tiles = (num_tokens + TOKENS_PER_TILE - 1) // TOKENS_PER_TILE
        if tile_in_row >= num_tiles:
            return
        # The last tile first: it sees the most keys, and long work is best begun early.
        tile_token = (num_tiles - 1 - tile_in_row) * TOKENS_PER_TILE
    seq_len = tl.load(seq_lens + row)
    first_position = seq_len - num_tokens + tile_token

    tile_row = tl.arange(0, ROWS)
    token_in_row = tile_token + tile_row // TILE_HEADS
    head = tl.program_id(1) * TILE_HEADS + tile_row % TILE_HEADS
    is_real = (tile_row < TOKENS_PER_TILE * TILE_HEADS) & (token_in_row < num_tokens) & (head < NUM_HEADS)
    positions = seq_len - num_tokens + token_in_row
    batch_token = (token + token_in_row).to(tl.int64)
    last_key = seq_len
    if not DECODE:
        last_key = tl.minimum(first_position + TOKENS_PER_TILE, seq_len)
    # Segments follow from the row's own length; how many programs take turns at them does not matter to the result.
    num_segments = num_segments_of(last_key, SEGMENT_TOKENS, MAX_SEGMENTS)
    if DECODE:
        if tl.program_id(2) >= num_segments:
            return

    ranks = tl.arange(0, PADDED_RANK)
    ropes = tl.arange(0, PADDED_ROPE)
    exists = is_real[:, None] & (ranks < RANK)[None, :]
    query_at = query + (batch_token[:, None] * NUM_HEADS + head[:, None]) * LATENT_DIM
    latent_queries = tl.load(query_at + ranks[None, :], mask=exists, other=0.0)
    rope_queries = tl.load(
        query_at + RANK + ropes[None, :], mask=is_real[:, None] & (ropes < ROPE_DIM)[None, :], other=0.0
    )
    log2_scale = tl.full([ROWS], 1.0, tl.float32) * (scale * LOG2_E)
    table = block_table + row.to(tl.int64) * table_stride
    result_at = output + (batch_token[:, None] * NUM_HEADS + head[:, None]) * RANK + ranks[None, :]

    if DECODE:
        num_tiles = (last_key + TILE - 1) // TILE
        segment_keys = (num_tiles + num_segments - 1) // num_segments * TILE
        for segment in range(tl.program_id(2), num_segments, tl.num_programs(2)):
            begin = segment * segment_keys
            end = tl.minimum(begin + segment_keys, last_key)
            weighted = tl.full([ROWS, PADDED_RANK], 0.0, dtype=tl.float32)
            row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
            if QUERY_LEN == 1:
                row_sums = tl.full([ROWS, TILE], 0.0, dtype=tl.float32)
            else:
                row_sums = tl.full([ROWS], 0.0, dtype=tl.float32)
            blocks = blocks_in_context(table, begin, 0, end, BLOCK_SIZE, TILE, 0)
            for start in range(begin, end, TILE):
                following = blocks_in_context(table, start + TILE, 0, end, BLOCK_SIZE, TILE, 0)
                weighted, row_max, row_sums = _attend_tile(
                    weighted, row_max, row_sums, latent_queries, rope_queries, cache, blocks, start, end, positions,
                    log2_scale, RANK, PADDED_RANK, ROPE_DIM, PADDED_ROPE, BLOCK_SIZE, TILE, True, QUERY_LEN == 1,
                )  # fmt: skip
                blocks = following
            if QUERY_LEN == 1:
                row_sum = tl.sum(row_sums, 1)
            else:
                row_sum = row_sums
            if num_segments == 1:
                tl.store(result_at, normalized(weighted, row_sum, 1.0).to(output.dtype.element_ty), mask=exists)
            else:
                place = (row - first_row).to(tl.int64) * QUERY_LEN + token_in_row
                part = (place * NUM_HEADS + head) * MAX_SEGMENTS + segment
                tl.store(partial_max + part, row_max * log2_scale, mask=is_real)
                tl.store(partial_sum + part, row_sum, mask=is_real)
                tl.store(partial_output + part[:, None] * RANK + ranks[None, :], weighted, mask=exists)
    else:
        weighted = tl.full([ROWS, PADDED_RANK], 0.0, dtype=tl.float32)
        row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
        row_sum = tl.full([ROWS], 0.0, dtype=tl.float32)
        # Tiles that end before the tile's first query are seen by every query, whole.
        masked_from = tl.maximum(first_position + 1, 0) // TILE * TILE
        blocks = tl.load(table + block_numbers(0, BLOCK_SIZE, TILE), mask=masked_from > 0, other=0)
        for start in range(0, masked_from, TILE):
            at = block_numbers(start + TILE, BLOCK_SIZE, TILE)
            following = tl.load(table + at, mask=start + TILE < masked_from, other=0)
            weighted, row_max, row_sum = _attend_tile(
                weighted, row_max, row_sum, latent_queries, rope_queries, cache, blocks, start, last_key, positions,
                log2_scale, RANK, PADDED_RANK, ROPE_DIM, PADDED_ROPE, BLOCK_SIZE, TILE, False, False,
            )  # fmt: skip
            blocks = following
        blocks = blocks_in_context(table, masked_from, 0, last_key, BLOCK_SIZE, TILE, 0)
        for start in range(masked_from, last_key, TILE):
            following = blocks_in_context(table, start + TILE, 0, last_key, BLOCK_SIZE, TILE, 0)
            weighted, row_max, row_sum = _attend_tile(
                weighted, row_max, row_sum, latent_queries, rope_queries, cache, blocks, start, last_key, positions,
                log2_scale, RANK, PADDED_RANK, ROPE_DIM, PADDED_ROPE, BLOCK_SIZE, TILE, True, False,
            )  # fmt: skip
            blocks = following
        tl.store(result_at, normalized(weighted, row_sum, 1.0).to(output.dtype.element_ty), mask=exists)
