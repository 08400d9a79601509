"""Paged attention in Triton: one source, compiled for decode and for prefill, and the reduction of split contexts.

A program holds a tile of query rows and walks over keys. The query heads that share a KV head are in one tile, so that keys
and values are read once for all of them; with H heads a KV head, row m of the tile is token `m // H`, head `m % H`:

    prefill, H = 3, ROWS = 64      token 0: heads 0 1 2 │ token 1: heads 0 1 2 │ … │ token 20 │ 1 row unused
    decode,  H = 8, ROWS = 16      the row's only token: heads 0 … 7            │ 8 rows unused
    short,   H = 8, ROWS = 64      up to 8 tokens, as verified drafts are, over a context that is cut as in decode

Keys come in tiles of TILE consecutive positions, wherever their blocks are: position p is slot `p % BLOCK_SIZE` of block
`block_table[p // BLOCK_SIZE]`. A tile begins at a multiple of TILE; it may hold several blocks, or a part of one. Its blocks
are looked up one tile earlier: a look-up and loads that wait for it, in one iteration, would halve the pipeline's
depth. Softmax is kept as in FlashAttention (Dao et al., 2022): running maximum, sum and weighted values, all float32.

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
def first_tile_of(query_start_loc, row, first_row, first_token, TOKENS_PER_TILE: tl.constexpr):
    """The number of the first query tile of `row`, where tiles are counted from row `first_row` on, which begins at
    `first_token`.

    The numbering leaves at most one tile unused after each row, and it needs nothing but lengths that are on the device: the
    grid's size, `tokens // TOKENS_PER_TILE + rows`, is known without them.
    """
    return (tl.load(query_start_loc + row) - first_token) // TOKENS_PER_TILE + row - first_row


@triton.jit
def row_of_tile(query_start_loc, first_row, first_token, num_rows, tile, TOKENS_PER_TILE: tl.constexpr):
    """The last row that starts at query tile `tile` or before."""
    low = first_row
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if first_tile_of(query_start_loc, middle, first_row, first_token, TOKENS_PER_TILE) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def block_numbers(start, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """For the keys `start .. start + TILE - 1`, where `start` is a multiple of TILE: the columns of the block table."""
    keys = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0:
        numbers = start // BLOCK_SIZE + keys // BLOCK_SIZE
    else:
        numbers = (start + keys) // BLOCK_SIZE
    return numbers


@triton.jit
def slots_in_block(start, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Likewise, their places in their blocks. If a tile is whole blocks, they are the same for every tile."""
    keys = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0:
        slots = keys % BLOCK_SIZE
    else:
        slots = (start + keys) % BLOCK_SIZE
    return slots


@triton.jit
def is_in_context(start, first_key, last_key, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the keys `start .. start + TILE - 1` are among `first_key .. last_key - 1`; without a window the first is 0."""
    keys_at = start + tl.arange(0, TILE)
    in_context = keys_at < last_key
    if WINDOW > 0:
        in_context = in_context & (keys_at >= first_key)
    return in_context


@triton.jit
def blocks_in_context(
    table, start, first_key, last_key, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr
):
    """The blocks of the keys `start .. start + TILE - 1`, 0 for those outside `first_key .. last_key - 1`."""
    in_context = is_in_context(start, first_key, last_key, TILE, WINDOW)
    return tl.load(table + block_numbers(start, BLOCK_SIZE, TILE), mask=in_context, other=0)


@triton.jit
def fold_scores(scores, row_max, row_sum, log2_scale, MASKED: tl.constexpr, SINGLE: tl.constexpr):
    """Fold a tile of scores into the running softmax: their weights, the factor of what was summed before, and the new
    maximum and sum. With MASKED, scores of -inf are of keys that are not seen. `log2_scale` and SINGLE: see `_attend_tile`."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = new_max
    if MASKED:
        # A row that has seen nothing yet keeps -inf; it must not become inf - inf.
        base = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
    exponent = base * log2_scale
    weights = tl.exp2(scores * log2_scale[:, None] - exponent[:, None])
    shrink = tl.exp2(row_max * log2_scale - exponent)
    if SINGLE:  # a sum for each place in a tile, put together at the end: warps that share a row need not synchronize
        row_sum = row_sum * shrink[:, None] + weights
    else:
        row_sum = row_sum * shrink + tl.sum(weights, 1)
    return weights, shrink, new_max, row_sum


@triton.jit
def _attend_tile(
    weighted,
    row_max,
    row_sum,
    queries,
    k_page,
    v_page,
    blocks,
    start,
    first_key,
    last_key,
    positions,
    score_scale,
    log2_scale,
    dims,
    dim_is_real,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Fold the keys `start .. start + TILE - 1`, which are in `blocks`, into the running softmax.

    `start` is a multiple of TILE. MASKED: some query may not see some of the keys. SINGLE: all rows are of one token. Scores
    stay as the product leaves them; times `log2_scale`, which must be positive, they are exponents of 2. Where the maximum is
    subtracted, that comes for free.
    """
    # Slots outside the context may hold anything, NaN too: they are never loaded.
    loaded = tl.full([TILE, 1], True, tl.int1)
    if MASKED:
        in_context = is_in_context(start, first_key, last_key, TILE, WINDOW)
        loaded = in_context[:, None]
    if dims.shape[0] != HEAD_DIM:
        loaded = loaded & dim_is_real[None, :]
    places = (slots_in_block(start, BLOCK_SIZE, TILE) * HEAD_DIM)[:, None] + dims[None, :]
    offsets = (blocks.to(tl.int64) * block_stride)[:, None]
    keys = tl.load(k_page + places + offsets, mask=loaded, other=0.0).to(queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if HAS_SOFT_CAP:
        # cap * tanh(x / cap), with tanh(y) = 1 - 2 / (exp(2 y) + 1); the cap is in `log2_scale`.
        scores = 1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0)
    if MASKED:
        if SINGLE:  # the only token sees every key of the context
            visible = in_context[None, :]
        else:  # a row's queries see no key outside of it; what rows of the tile without a query see is thrown away
            reach = (positions - start)[:, None]
            keys_in_tile = tl.arange(0, TILE)[None, :]
            visible = keys_in_tile <= reach
            if WINDOW > 0:
                visible = visible & (keys_in_tile > reach - WINDOW)
        scores = tl.where(visible, scores, NEGATIVE_INFINITY)
    weights, shrink, new_max, row_sum = fold_scores(scores, row_max, row_sum, log2_scale, MASKED, SINGLE)
    values = tl.load(v_page + places + offsets, mask=loaded, other=0.0).to(queries.dtype)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(weights.to(queries.dtype), values, weighted, input_precision="ieee")
    return weighted, new_max, row_sum


@triton.jit
def _sink_weight(sinks, heads, exists, exponents):
    """What each row's sink adds to the sum of weights, of which `exponents`, of 2, is the greatest.

    Where it is greater by far, it is infinite, and the row's result 0, which the result then rounds to anyway.
    """
    return tl.exp2(tl.load(sinks + heads, mask=exists, other=NEGATIVE_INFINITY) * LOG2_E - exponents)


@triton.jit
def normalized(weighted, row_sum, v_scale):
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
    sinks,
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
    HAS_SINKS: tl.constexpr,
    DECODE: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Decode: grid (rows, KV heads, programs that share a row's segments), up to QUERY_LEN tokens a row, all in one tile; with
    QUERY_LEN 1 exactly one. Prefill: grid (query tiles, KV heads).

    Pointers: output and query [T, heads, HEAD_DIM], the query with `query_stride` elements a token; caches [blocks, KV heads,
    BLOCK_SIZE, HEAD_DIM] of the query's type or float8, whose numbers count `k_scale` and `v_scale` times; block_table int32
    with `table_stride` a row; seq_lens and query_start_loc int32. Rows are those from `first_row` on, in prefill up to
    `num_rows - 1`. WINDOW 0: none. sinks float32 [heads], with HAS_SINKS. Only with DECODE and more than one segment:
    partial_output float32 [rows, QUERY_LEN, heads, MAX_SEGMENTS, HEAD_DIM], partial_max and partial_sum float32 [rows,
    QUERY_LEN, heads, MAX_SEGMENTS], for `reduce_segments_kernel`.
    """
    TOKENS_PER_TILE: tl.constexpr = ROWS // HEADS_PER_KV
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * HEADS_PER_KV
    kv_head = tl.program_id(1)
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
    token_in_row = tile_token + tile_row // HEADS_PER_KV
    is_real = (tile_row < TOKENS_PER_TILE * HEADS_PER_KV) & (token_in_row < num_tokens)
    if DECODE and QUERY_LEN == 1:
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
    # One factor for a row: of a plain call all the same, of float8 caches each query's own.
    log2_scale = tl.full([ROWS], 1.0, tl.float32) * (scale * k_scale * LOG2_E)
    if k_cache.dtype.element_ty.primitive_bitwidth == 8 and query.dtype.element_ty.primitive_bitwidth == 16:
        wide = queries.to(tl.float32)
        greatest = tl.max(tl.abs(wide), 1)
        greatest = tl.where(greatest > 0.0, greatest, 1.0)
        queries = (wide / greatest[:, None]).to(tl.float16)
        log2_scale = log2_scale * greatest
    score_scale = log2_scale[:, None]
    if HAS_SOFT_CAP:
        score_scale = score_scale * 2.0 / soft_cap
        log2_scale = tl.full([ROWS], 1.0, tl.float32) * (soft_cap * LOG2_E)
    page = kv_head * (BLOCK_SIZE * HEAD_DIM)
    k_page = k_cache + page
    v_page = v_cache + page
    table = block_table + row.to(tl.int64) * table_stride
    block_stride: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    exists = is_real[:, None] & dim_is_real[None, :]
    result_at = output + (batch_token[:, None] * NUM_HEADS + head[:, None]) * HEAD_DIM + dims[None, :]

    if DECODE:
        first_start = first_key // TILE * TILE
        num_tiles = (last_key - first_start + TILE - 1) // TILE
        segment_keys = (num_tiles + num_segments - 1) // num_segments * TILE
        for segment in range(tl.program_id(2), num_segments, tl.num_programs(2)):
            begin = first_start + segment * segment_keys
            end = tl.minimum(begin + segment_keys, last_key)
            weighted = tl.full([ROWS, PADDED_DIM], 0.0, dtype=tl.float32)
            row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
            if QUERY_LEN == 1:
                row_sums = tl.full([ROWS, TILE], 0.0, dtype=tl.float32)
            else:
                row_sums = tl.full([ROWS], 0.0, dtype=tl.float32)
            blocks = blocks_in_context(table, begin, first_key, end, BLOCK_SIZE, TILE, WINDOW)
            for start in range(begin, end, TILE):
                following = blocks_in_context(table, start + TILE, first_key, end, BLOCK_SIZE, TILE, WINDOW)
                weighted, row_max, row_sums = _attend_tile(
                    weighted, row_max, row_sums, queries, k_page, v_page, blocks, start, first_key, end, positions,
                    score_scale, log2_scale, dims, dim_is_real, block_stride,
                    BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, True, QUERY_LEN == 1,
                )  # fmt: skip
                blocks = following
            if QUERY_LEN == 1:
                row_sum = tl.sum(row_sums, 1)
            else:
                row_sum = row_sums
            if num_segments == 1:
                if HAS_SINKS:
                    row_sum += _sink_weight(sinks, head, is_real, row_max * log2_scale)
                tl.store(result_at, normalized(weighted, row_sum, v_scale).to(output.dtype.element_ty), mask=exists)
            else:
                place = (row - first_row).to(tl.int64) * QUERY_LEN + token_in_row
                part = (place * NUM_HEADS + head) * MAX_SEGMENTS + segment
                tl.store(partial_max + part, row_max * log2_scale, mask=is_real)
                tl.store(partial_sum + part, row_sum, mask=is_real)
                tl.store(partial_output + part[:, None] * HEAD_DIM + dims[None, :], weighted, mask=exists)
    else:
        weighted = tl.full([ROWS, PADDED_DIM], 0.0, dtype=tl.float32)
        row_max = tl.full([ROWS], NEGATIVE_INFINITY, dtype=tl.float32)
        row_sum = tl.full([ROWS], 0.0, dtype=tl.float32)
        masked_from = first_key // TILE * TILE
        if WINDOW == 0:
            # Tiles that end before the tile's first query are seen by every query, whole.
            masked_from = tl.maximum(first_position + 1, 0) // TILE * TILE
            blocks = tl.load(table + block_numbers(0, BLOCK_SIZE, TILE), mask=masked_from > 0, other=0)
            for start in range(0, masked_from, TILE):
                at = block_numbers(start + TILE, BLOCK_SIZE, TILE)
                following = tl.load(table + at, mask=start + TILE < masked_from, other=0)
                weighted, row_max, row_sum = _attend_tile(
                    weighted, row_max, row_sum, queries, k_page, v_page, blocks, start, first_key, last_key, positions,
                    score_scale, log2_scale, dims, dim_is_real, block_stride,
                    BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, False, False,
                )  # fmt: skip
                blocks = following
        blocks = blocks_in_context(table, masked_from, first_key, last_key, BLOCK_SIZE, TILE, WINDOW)
        for start in range(masked_from, last_key, TILE):
            following = blocks_in_context(table, start + TILE, first_key, last_key, BLOCK_SIZE, TILE, WINDOW)
            weighted, row_max, row_sum = _attend_tile(
                weighted, row_max, row_sum, queries, k_page, v_page, blocks, start, first_key, last_key, positions,
                score_scale, log2_scale, dims, dim_is_real, block_stride,
                BLOCK_SIZE, HEAD_DIM, TILE, WINDOW, HAS_SOFT_CAP, True, False,
            )  # fmt: skip
            blocks = following
        if HAS_SINKS:
            row_sum += _sink_weight(sinks, head, is_real, row_max * log2_scale)
        tl.store(result_at, normalized(weighted, row_sum, v_scale).to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=["seq_lens", "query_start_loc"])
def reduce_segments_kernel(
    output,
    partial_output,
    partial_max,
    partial_sum,
    sinks,
    seq_lens,
    query_start_loc,
    first_row,
    v_scale,
    QUERY_LEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Put the segments of rows from `first_row` on together: grid (rows, heads, QUERY_LEN). Rows of one segment are complete
    and left alone."""
    row = first_row + tl.program_id(0)
    head = tl.program_id(1)
    token_in_row = tl.program_id(2)
    token = tl.load(query_start_loc + row).to(tl.int64)
    num_tokens = 1
    if QUERY_LEN > 1:
        num_tokens = (tl.load(query_start_loc + row + 1) - token).to(tl.int32)
        if token_in_row >= num_tokens:
            return
    num_keys = tl.load(seq_lens + row)
    if WINDOW > 0:
        num_keys = tl.minimum(num_keys, num_tokens - 1 + WINDOW)
    num_segments = num_segments_of(num_keys, SEGMENT_TOKENS, MAX_SEGMENTS)
    if num_segments == 1:
        return
    segments = tl.arange(0, MAX_SEGMENTS)
    dims = tl.arange(0, PADDED_DIM)
    exists = segments < num_segments
    place = (row - first_row).to(tl.int64) * QUERY_LEN + token_in_row
    part = (place * NUM_HEADS + head) * MAX_SEGMENTS + segments
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
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head) * LOG2_E - tl.max(maxima, 0))
    result = tl.sum(shares[:, None] * weighted, 0) / total * v_scale
    tl.store(
        output + ((token + token_in_row) * NUM_HEADS + head) * HEAD_DIM + dims,
        result.to(output.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
