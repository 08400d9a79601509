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
    best = tl.full([], NEGATIVE_INFINITY, tl.float32)
    best_id = tl.full([], 0, tl.int32)
    nan_id = tl.full([], NO_TOKEN, tl.int32)
    for start in range(0, VOCABULARY, TILE):
        ids = start + tl.arange(0, TILE)
        values = tl.load(logits + row * row_stride + ids, mask=ids < VOCABULARY, other=NEGATIVE_INFINITY)
        is_nan = values != values
        nan_id = tl.minimum(nan_id, tl.min(tl.where(is_nan, ids, NO_TOKEN), 0))
        values = tl.where(is_nan, NEGATIVE_INFINITY, values)
        tile_best = tl.max(values, 0)
        tile_id = tl.min(tl.where(values == tile_best, ids, NO_TOKEN), 0)
        best_id = tl.where(tile_best > best, tile_id, best_id)
        best = tl.maximum(best, tile_best)
    has_nan = nan_id != NO_TOKEN
    tl.store(token_ids + row, tl.where(has_nan, nan_id, best_id).to(tl.int64))
    tl.store(best_logits + row, tl.where(has_nan, float("nan"), best))


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
def _mass(logits, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY: tl.constexpr, TILE: tl.constexpr):
    """The weight of all tokens before the bound, float64."""
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCABULARY, TILE):
        ids = start + tl.arange(0, TILE)
        weights = _tile_weights(logits, ids, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY)
        mass += tl.sum(weights.to(tl.float64), 0)
    return mass


@triton.jit
def _draw(
    logits, best, inverse_temperature, min_p, bound, bound_id, target, VOCABULARY: tl.constexpr, TILE: tl.constexpr
):
    """The first token, by ids, up to which the tokens before the bound weigh more than `target`: its id and weight.

    Where rounding leaves `target` at the whole weight, the last token that weighs anything.
    """
    before = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], NO_TOKEN, tl.int32)
    chosen_weight = tl.full([], 0.0, tl.float32)
    last = tl.full([], 0, tl.int32)
    last_weight = tl.full([], 0.0, tl.float32)
    for start in range(0, VOCABULARY, TILE):
        ids = start + tl.arange(0, TILE)
        weights = _tile_weights(logits, ids, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY)
        cumulative = before + tl.cumsum(weights.to(tl.float64), 0)
        reached = (cumulative > target) & (weights > 0.0)
        first = tl.min(tl.where(reached, ids, NO_TOKEN), 0)
        first_weight = tl.max(tl.where(ids == first, weights, 0.0), 0)
        is_new = (chosen == NO_TOKEN) & (first != NO_TOKEN)
        chosen_weight = tl.where(is_new, first_weight, chosen_weight)
        chosen = tl.where(is_new, first, chosen)
        tile_last = tl.max(tl.where(weights > 0.0, ids, -1), 0)
        last_weight = tl.where(tile_last >= 0, tl.max(tl.where(ids == tile_last, weights, 0.0), 0), last_weight)
        last = tl.maximum(last, tile_last)
        before += tl.sum(weights.to(tl.float64), 0)
    found = chosen != NO_TOKEN
    return tl.where(found, chosen, last), tl.where(found, chosen_weight, last_weight)


@triton.jit
def open_kernel(
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
):
    """Grid (rows that sample): sample among all tokens that min-p and top-p leave.

    rows int64 [R], which rows of logits and best_logits; seeds int64 bit patterns and positions int64 [R]; inverse
    temperatures and min_ps float32, top_ps float64 [R]; token_ids int64 [R].
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
    mass = _mass(start, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY, TILE)
    needed = tl.load(top_ps + index) * mass
    attempt = tl.full([], 0, tl.int32)
    chosen = tl.full([], 0, tl.int32)
    # A row of NaN or without any token weighs nothing that can be compared: it draws nothing and fails on the host.
    searching = mass > 0.0
    while searching:
        target = _uniform(seed, position, attempt) * mass
        chosen, weight = _draw(start, best, inverse_temperature, min_p, bound, bound_id, target, VOCABULARY, TILE)
        bound = weight
        bound_id = chosen
        mass = _mass(start, best, inverse_temperature, min_p, bound, bound_id, VOCABULARY, TILE)
        attempt += 1
        searching = mass >= needed
    tl.store(token_ids + index, chosen.to(tl.int64))
