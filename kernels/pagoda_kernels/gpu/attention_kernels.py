"""Paged attention in Triton: one source, compiled for decode and for prefill, and the reduction of split contexts.

A program holds a tile of query rows and walks over keys. The query heads that share a KV head stand in one tile, so that keys
and values are read once for all of them; with H heads a KV head, row m of the tile is token `m // H`, head `m % H`:

    prefill, H = 3, ROWS = 64      token 0: heads 0 1 2 │ token 1: heads 0 1 2 │ … │ token 20 │ 1 row unused
    decode,  H = 8, ROWS = 16      the row's only token: heads 0 … 7            │ 8 rows unused

Keys come in tiles of TILE consecutive positions, wherever their blocks are: position p is slot `p % BLOCK_SIZE` of block
`block_table[p // BLOCK_SIZE]`. A tile may hold several blocks, or a part of one. Softmax is kept as in FlashAttention (Dao et
al., 2022): a running maximum, sum and weighted values, all float32.

Under half-precision queries a float8 cache is widened to float16, whatever the queries are: one instruction converts two
numbers, where bfloat16 takes four, and more than the bandwidth leaves time for. As bfloat16 has numbers that float16 has not,
each query is divided by its greatest number first, which counts again in the scores.

What depends on what: the tiles of a token and the order of its sums depend on its own request's lengths only, never on the
rest of the batch. So results are the same to the bit alone and in any batch (docs/architecture.md, invariant 9).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def num_segments_of(num_keys, SEGMENT_TOKENS: tl.constexpr, MAX_SEGMENTS: tl.constexpr):
    """How many parts a decode row's visible keys are cut into: one for every SEGMENT_TOKENS, from 1 to MAX_SEGMENTS."""
    return tl.minimum(tl.maximum((num_keys + SEGMENT_TOKENS - 1) // SEGMENT_TOKENS, 1), MAX_SEGMENTS)


@triton.jit
def _first_tile_of(query_start_loc, row, first_row, TOKENS_PER_TILE: tl.constexpr):
    """The number of the first query tile of `row`, where tiles are counted from row `first_row` on.

    All rows before `first_row` have one token. The numbering leaves at most one tile unused after each row, and it needs
    nothing but lengths that are on the device: the grid's size, `tokens // TOKENS_PER_TILE + rows`, is known without them.
    """
    return (tl.load(query_start_loc + row) - first_row) // TOKENS_PER_TILE + row - first_row


@triton.jit
def _row_of_tile(query_start_loc, first_row, num_rows, tile, TOKENS_PER_TILE: tl.constexpr):
    """The last row that starts at query tile `tile` or before."""
    low = first_row
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if _first_tile_of(query_start_loc, middle, first_row, TOKENS_PER_TILE) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend_tile(
    weighted,
    row_max,
    row_sum,
    queries,
    k_page,
    v_page,
    table,
    start,
    first_key,
    last_key,
    positions,
    score_scale,
    soft_cap,
    dims,
    dim_is_real,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys `start .. start + TILE - 1` into the running softmax. MASKED: some query may not see some of them."""
    keys_at = start + tl.arange(0, TILE)
    # Slots outside the context may hold anything, NaN too: they are never loaded.
    if MASKED:
        in_context = (keys_at >= first_key) & (keys_at < last_key)
        loaded = in_context[:, None] & dim_is_real[None, :]
        block = tl.load(table + keys_at // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
    else:
        loaded = dim_is_real[None, :]
        block = tl.load(table + keys_at // BLOCK_SIZE).to(tl.int64)
    offsets = block * block_stride + (keys_at % BLOCK_SIZE) * HEAD_DIM
    keys = tl.load(k_page + offsets[:, None] + dims[None, :], mask=loaded, other=0.0).to(queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if HAS_SOFT_CAP:
        # cap * tanh(x / cap), with tanh(y) = 1 - 2 / (exp(2 y) + 1); scores are in units of log2 from there on.
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0)) * LOG2_E
    else:
        scores = scores * score_scale
    if MASKED:
        distance = positions[:, None] - keys_at[None, :]
        visible = (distance >= 0) & in_context[None, :]
        if WINDOW > 0:
            visible = visible & (distance < WINDOW)
        scores = tl.where(visible, scores, NEGATIVE_INFINITY)
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; it must not become inf - inf.
    base = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    values = tl.load(v_page + offsets[:, None] + dims[None, :], mask=loaded, other=0.0).to(queries.dtype)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(weights.to(queries.dtype), values, weighted, input_precision="ieee")
    return weighted, new_max, row_sum


@triton.jit
def _normalized(weighted, row_sum, v_scale):
    """Weighted values over the sum of their weights; zeros for a row without any key, as padding may be."""
    return weighted / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None] * v_scale


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def paged_attention_kernel(
    output,
    partial_output,
    partial_max,
    partial_sum,
    query,
    k_cache,
    v_cache,
    block_table,
    seq_lens,
    query_start_loc,
    first_row,
    num_rows,
    scale,
    soft_cap,
    k_scale,
    v_scale,
    query_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    DECODE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Decode: grid (rows, KV heads, programs that share a row's segments), one query token a row. Prefill: grid (query tiles,
    KV heads).

    Pointers: output and query [T, heads, HEAD_DIM], the query with `query_stride` elements a token; caches [blocks, KV heads,
    BLOCK_SIZE, HEAD_DIM] of the query's type or float8, whose numbers count `k_scale` and `v_scale` times; block_table int32
    with `table_stride` a row; seq_lens and query_start_loc int32. Decode takes rows from 0 on, prefill the rows `first_row ..
    num_rows - 1`, before which every row has one token. WINDOW 0: none. Only with DECODE and more than one segment:
    partial_output float32 [rows, heads, MAX_SEGMENTS, HEAD_DIM], partial_max and partial_sum float32 [rows, heads,
    MAX_SEGMENTS], for `reduce_segments_kernel`.
    """
    TOKENS_PER_TILE: tl.constexpr = ROWS // HEADS_PER_KV
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * HEADS_PER_KV
    kv_head = tl.program_id(1)
    if DECODE:
        row = tl.program_id(0)
        token = tl.load(query_start_loc + row)
        num_tokens = 1
        tile_token = 0
    else:
        row = _row_of_tile(query_start_loc, first_row, num_rows, tl.program_id(0), TOKENS_PER_TILE)
        token = tl.load(query_start_loc + row)
        num_tokens = tl.load(query_start_loc + row + 1) - token
        tile_in_row = tl.program_id(0) - _first_tile_of(query_start_loc, row, first_row, TOKENS_PER_TILE)
        num_tiles = (num_tokens + TOKENS_PER_TILE - 1) // TOKENS_PER_TILE
        if tile_in_row >= num_tiles:
            return
        # The last tile first: it sees the most keys, and long work is best begun early.
        tile_token = (num_tiles - 1 - tile_in_row) * TOKENS_PER_TILE
    seq_len = tl.load(seq_lens + row)
    first_position = seq_len - num_tokens + tile_token

    tile_row = tl.arange(0, ROWS)
    token_in_row = tile_token + tile_row // HEADS_PER_KV
    is_real = (tile_row < TOKENS_PER_TILE * HEADS_PER_KV) & (token_in_row < num_tokens)
    if DECODE:
        is_real = tile_row < HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + tile_row % HEADS_PER_KV
    positions = seq_len - num_tokens + token_in_row
    dims = tl.arange(0, PADDED_DIM)
    dim_is_real = dims < HEAD_DIM
    batch_token = (token + token_in_row).to(tl.int64)

    # The keys that any query of the tile sees.
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
    last_key = seq_len
    if not DECODE:
        last_key = tl.minimum(first_position + TOKENS_PER_TILE, seq_len)
    # Segments follow from the row's own length; how many programs take turns at them does not matter to the result.
    num_segments = num_segments_of(last_key - first_key, SEGMENT_TOKENS, MAX_SEGMENTS)
    if DECODE:
        if tl.program_id(2) >= num_segments:
            return

    queries = tl.load(
        query + batch_token[:, None] * query_stride + head[:, None] * HEAD_DIM + dims[None, :],
        mask=is_real[:, None] & dim_is_real[None, :],
        other=0.0,
    )
    score_scale = scale * k_scale * LOG2_E
    if k_cache.dtype.element_ty.primitive_bitwidth == 8 and query.dtype.element_ty.primitive_bitwidth == 16:
        wide = queries.to(tl.float32)
        greatest = tl.max(tl.abs(wide), 1)
        greatest = tl.where(greatest > 0.0, greatest, 1.0)
        queries = (wide / greatest[:, None]).to(tl.float16)
        score_scale = score_scale * greatest[:, None]
    if HAS_SOFT_CAP:
        score_scale = score_scale * 2.0 / soft_cap
    page = kv_head * (BLOCK_SIZE * HEAD_DIM)
    k_page = k_cache + page
    v_page = v_cache + page
    table = block_table + row.to(tl.int64) * table_stride
    block_stride: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    exists = is_real[:, None] & dim_is_real[None, :]
    result_at = output + (batch_token[:, None] * NUM_HEADS + head[:, None]) * HEAD_DIM + dims[None, :]

    if DECODE:
        num_tiles = (last_key - first_key + TILE - 1) // TILE
        segment_keys = (num_tiles + num_segments - 1) // num_segments * TILE
        for segment in range(tl.program_id(2), num_segments, tl.num_programs(2)):
            begin = first_key + segment * segment_keys
            end = tl.minimum(begin + segment_keys, last_key)
            weighted = tl.full([ROWS, PADDED_DIM], 0.0, dtype=tl.float32)
            row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
            row_sum = tl.full([ROWS], 0.0, dtype=tl.float32)
            for start in range(begin, end, TILE):
                weighted, row_max, row_sum = _attend_tile(
                    weighted, row_max, row_sum, queries, k_page, v_page, table, start, begin, end, positions,
                    score_scale, soft_cap, dims, dim_is_real, block_stride,
                    BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, True,
                )  # fmt: skip
            if num_segments == 1:
                tl.store(result_at, _normalized(weighted, row_sum, v_scale).to(output.dtype.element_ty), mask=exists)
            else:
                part = (row.to(tl.int64) * NUM_HEADS + head) * MAX_SEGMENTS + segment
                tl.store(partial_max + part, row_max, mask=is_real)
                tl.store(partial_sum + part, row_sum, mask=is_real)
                tl.store(partial_output + part[:, None] * HEAD_DIM + dims[None, :], weighted, mask=exists)
    else:
        weighted = tl.full([ROWS, PADDED_DIM], 0.0, dtype=tl.float32)
        row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
        row_sum = tl.full([ROWS], 0.0, dtype=tl.float32)
        masked_from = first_key
        if WINDOW == 0:
            # Tiles that end before the tile's first query are seen by every query, whole.
            masked_from = tl.maximum(first_position + 1, 0) // TILE * TILE
            for start in range(0, masked_from, TILE):
                weighted, row_max, row_sum = _attend_tile(
                    weighted, row_max, row_sum, queries, k_page, v_page, table, start, first_key, last_key, positions,
                    score_scale, soft_cap, dims, dim_is_real, block_stride,
                    BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, False,
                )  # fmt: skip
        for start in range(masked_from, last_key, TILE):
            weighted, row_max, row_sum = _attend_tile(
                weighted, row_max, row_sum, queries, k_page, v_page, table, start, first_key, last_key, positions,
                score_scale, soft_cap, dims, dim_is_real, block_stride,
                BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, True,
            )  # fmt: skip
        tl.store(result_at, _normalized(weighted, row_sum, v_scale).to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["seq_lens", "query_start_loc"])
def reduce_segments_kernel(
    output,
    partial_output,
    partial_max,
    partial_sum,
    seq_lens,
    query_start_loc,
    v_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Put the segments of decode rows together: grid (rows, heads). Rows of one segment are complete and left alone."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    num_keys = tl.load(seq_lens + row)
    if WINDOW > 0:
        num_keys = tl.minimum(num_keys, WINDOW)
    num_segments = num_segments_of(num_keys, SEGMENT_TOKENS, MAX_SEGMENTS)
    if num_segments == 1:
        return
    segments = tl.arange(0, MAX_SEGMENTS)
    dims = tl.arange(0, PADDED_DIM)
    exists = segments < num_segments
    part = (row.to(tl.int64) * NUM_HEADS + head) * MAX_SEGMENTS + segments
    maxima = tl.load(partial_max + part, mask=exists, other=NEGATIVE_INFINITY)
    sums = tl.load(partial_sum + part, mask=exists, other=0.0)
    weighted = tl.load(
        partial_output + part[:, None] * HEAD_DIM + dims[None, :],
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    # A segment may hold no visible key, where rounding up to whole tiles left nothing for it.
    shares = tl.where(maxima == NEGATIVE_INFINITY, 0.0, tl.exp2(maxima - tl.max(maxima, 0)))
    total = tl.sum(shares * sums, 0)
    result = tl.sum(shares[:, None] * weighted, 0) / total * v_scale
    token = tl.load(query_start_loc + row).to(tl.int64)
    tl.store(
        output + (token * NUM_HEADS + head) * HEAD_DIM + dims,
        result.to(output.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
