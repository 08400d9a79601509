"""Choosing tokens without a sort and without asking the host anything, one program a row.

The choice is that of the torch sampler, draw for draw: the noise is Philox4x32-10 with the request's seed as the key and the
token's position as the counter; a number in [0, 1) is turned into a token by the inverse of the distribution in the order of
ids; top-p is kept by rejection, in which a token is good if those before it in the order (greater logit first, lower id first
among equals) weigh less than p of all. A rejected token is taken out with all that come after it, and another number is drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def greedy_kernel(
    token_ids,
    best_logits,
    logits,
    row_stride,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows): the greatest logit of each row and the lowest id that has it; NaN is greater than any number."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    # Each lane keeps its own best until the end; ids grow from tile to tile, so the first among equals stays.
    best = tl.full([TILE], NEGATIVE_INFINITY, tl.float32)
    best_ids = lanes
    nan_ids = tl.full([TILE], NO_TOKEN, tl.int32)
    for start in range(0, VOCABULARY, TILE):
        ids = start + lanes
        values = tl.load(logits + row * row_stride + ids, mask=ids < VOCABULARY, other=NEGATIVE_INFINITY)
        nan_ids = tl.where(values != values, tl.minimum(nan_ids, ids), nan_ids)
        is_better = values > best  # which no NaN is
        best = tl.where(is_better, values, best)
        best_ids = tl.where(is_better, ids, best_ids)
    greatest = tl.max(best, 0)
    best_id = tl.min(tl.where(best == greatest, best_ids, NO_TOKEN), 0)
    nan_id = tl.min(nan_ids, 0)
    has_nan = nan_id != NO_TOKEN
    tl.store(token_ids + row, tl.where(has_nan, nan_id, best_id).to(tl.int64))
    tl.store(best_logits + row, tl.where(has_nan, float("nan"), greatest))


@triton.jit
def token_bitmask_kernel(logits, rows, bitmask, row_stride, num_words, TILE: tl.constexpr):
    """Grid (rows, tiles of TILE tokens): minus infinity for tokens whose bit is not set; nothing else is written."""
    mask_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask_row)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_inside = ids < num_words * 32
    words = tl.load(bitmask + mask_row * num_words + ids // 32, mask=is_inside, other=-1)
    is_forbidden = ((words >> (ids % 32)) & 1) == 0
    tl.store(logits + row * row_stride + ids, NEGATIVE_INFINITY, mask=is_inside & is_forbidden)


@triton.jit
def _uniform(seed, position, attempt):
    """A number in [0, 1) with 53 random bits: float64, from uint64 seed and int64 position."""
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    number = attempt.to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, number, number * 0, 10)
    bits = ((first >> 5).to(tl.int64) << 26) | (second >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _tile_weights(logits, ids, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY: tl.constexpr):
    """Probabilities relative to the best token's, 0 for tokens that min-p drops or that do not come before `bound`.

    `bound` and `bound_id`: weight and id of the last rejected token.
    """
    values = tl.load(logits + ids, mask=ids < VOCABULARY, other=NEGATIVE_INFINITY)
    weights = tl.exp2((values - best) * inverse_temperature * LOG2_E)
    weights = tl.where(weights >= min_p, weights, 0.0)
    comes_before = (weights > bound) | ((weights == bound) & (ids < bound_id))
    return tl.where(comes_before, weights, 0.0)


@triton.jit
def _tile_sums(
    logits,
    best,
    inverse_temperature,
    min_p,
    bound,
    bound_id,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The weight of all tokens before the bound, tile by tile: float64 [TILES], with zeros behind the last tile."""
    tiles = tl.arange(0, TILES)
    sums = tl.full([TILES], 0.0, tl.float64)
    for start in range(0, VOCABULARY, TILE):
        ids = start + tl.arange(0, TILE)
        weights = _tile_weights(logits, ids, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY)
        sums = tl.where(tiles == start // TILE, tl.sum(weights.to(tl.float64), 0), sums)
    return sums


@triton.jit
def _draw(
    logits, best, inverse_temperature, min_p, bound, bound_id, sums, target,
    VOCABULARY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The first token, by ids, up to which the tokens before the bound weigh more than `target`: its id and weight.

    First the tile, by the sums of all, then the token in it. Where rounding leaves `target` at the whole weight, of all or of
    the tile, the last token there that weighs anything.
    """
    tiles = tl.arange(0, TILES)
    reached = (tl.cumsum(sums, 0) > target) & (sums > 0.0)
    tile = tl.min(tl.where(reached, tiles, NO_TOKEN), 0)
    tile = tl.where(tile == NO_TOKEN, tl.max(tl.where(sums > 0.0, tiles, 0), 0), tile)
    before = tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    ids = tile * TILE + tl.arange(0, TILE)
    weights = _tile_weights(logits, ids, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY)
    cumulative = before + tl.cumsum(weights.to(tl.float64), 0)
    first = tl.min(tl.where((cumulative > target) & (weights > 0.0), ids, NO_TOKEN), 0)
    last = tl.max(tl.where(weights > 0.0, ids, 0), 0)
    chosen = tl.where(first == NO_TOKEN, last, first)
    return chosen, tl.max(tl.where(ids == chosen, weights, 0.0), 0)


# One number a program from each: they may be slices of one upload, wherever it is cut.
@triton.jit(
    do_not_specialize_on_alignment=[
        "rows", "best_logits", "seeds", "positions", "inverse_temperatures", "min_ps", "top_ps",
    ]
)  # fmt: skip
def sample_top_p_kernel(
    token_ids,
    rows,
    logits,
    best_logits,
    seeds,
    positions,
    inverse_temperatures,
    min_ps,
    top_ps,
    row_stride,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (rows that sample): sample among all tokens that min-p and top-p leave.

    rows int64 [R], which rows of logits and best_logits; seeds int64 bit patterns and positions int64 [R]; inverse
    temperatures and min_ps float32, top_ps float64 [R]; token_ids int64 [R]. TILES: a power of two, at least the tiles of TILE
    that the vocabulary has. Without top-p the logits are read once, with it twice, and once more for each draw rejected.
    """
    index = tl.program_id(0)
    row = tl.load(rows + index)
    start = logits + row * row_stride
    best = tl.load(best_logits + row)
    seed = tl.load(seeds + index)
    position = tl.load(positions + index)
    inverse_temperature = tl.load(inverse_temperatures + index)
    min_p = tl.load(min_ps + index)
    bound = tl.full([], -1.0, tl.float32)  # every token comes before this one
    bound_id = tl.full([], NO_TOKEN, tl.int32)
    top_p = tl.load(top_ps + index)
    sums = _tile_sums(start, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY, TILE, TILES)
    mass = tl.sum(sums, 0)
    needed = top_p * mass
    attempt = tl.full([], 0, tl.int32)
    chosen = tl.full([], 0, tl.int32)
    # A row of NaN or without any token weighs nothing that can be compared: it draws nothing and fails on the host.
    searching = mass > 0.0
    while searching:
        target = _uniform(seed, position, attempt) * mass
        chosen, weight = _draw(
            start, best, inverse_temperature, min_p, bound, bound_id, sums, target, VOCABULARY, TILE, TILES
        )
        searching = top_p < 1.0
        if searching:
            bound = weight
            bound_id = chosen
            sums = _tile_sums(start, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY, TILE, TILES)
            mass = tl.sum(sums, 0)
            attempt += 1
            searching = mass >= needed
    tl.store(token_ids + index, chosen.to(tl.int64))
