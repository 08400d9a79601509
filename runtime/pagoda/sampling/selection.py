"""Sampling token ids from logits without sorting a vocabulary.

Tokens have one order: greater logit first, lower id first among equals. Top-k keeps the first k of it, top-p the shortest
beginning whose probability reaches p (at least one token), min-p the tokens at least `min_p` times as probable as the best;
min-p and top-k come first, and top-p counts within what they leave. As the order is total, the outcome depends on a row's own
logits only, never on the rest of the batch or on how a device breaks ties.

A row is cut into blocks of 64 ids. One pass finds the greatest logit of each block, and then:

    block maxima  [ 3.1 │ 0.2 │ 7.5 │ … ]      the best token is in the block with the greatest maximum; the K best tokens
                                               are in the K blocks with the greatest maxima: K·64 candidates, not V
    block sums    [ .02 │ .00 │ .31 │ … ]      the inverse CDF finds a block first, then a token in it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64

_LOW_32 = 0xFFFFFFFF
_LEAST_LOG, _LEAST_WEIGHT = -87.0, 2e-38  # e^-87 is 1.6e-38


def padded_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to whole blocks."""
    return -(-vocab_size // BLOCK) * BLOCK


def pad_to_blocks(logits: Tensor) -> Tensor:
    """Logits `[N, V]` with columns of -inf appended up to whole blocks; the same tensor where there are none to append."""
    missing = padded_size(logits.shape[1]) - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits.contiguous()


def block_maxima(logits: Tensor) -> Tensor:
    """The greatest logit of each block: `[N, V]` to `[N, V / 64]`. NaN wins over any number."""
    return logits.view(len(logits), -1, BLOCK).amax(-1)


def block_sums(weights: Tensor) -> Tensor:
    """The sum of each block: float32 `[N, V]` to float64 `[N, V / 64]`."""
    return weights.view(len(weights), -1, BLOCK).sum(-1).double()


def best_tokens(logits: Tensor, maxima: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best tokens of each of `rows`, best first: float32 logits and int64 ids, both `[R, count]`."""
    num_blocks = min(count, maxima.shape[1])
    all_blocks = torch.arange(maxima.shape[1], device=logits.device)
    _, blocks = _first(maxima.index_select(0, rows), all_blocks, num_blocks)
    candidates = _blocks_of(logits, rows.unsqueeze(1), blocks).flatten(1)
    ids = blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)
    return _first(candidates, ids.flatten(1), count)


def sample_from_top_k(
    values: Tensor,
    ids: Tensor,
    *,
    top_k: Tensor,
    inverse_temperature: Tensor,
    min_p: Tensor,
    top_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Sample each row among the first `top_k` of its best tokens: ids int64 `[R]`.

    `values` float32 and `ids` int64 `[R, K]` come from `best_tokens`. The parameters are `[R, 1]`: int64 `top_k`, at most K,
    and float64 the others.
    """
    weights = ((values - values[:, :1]).double() * inverse_temperature).exp_()
    kept = (weights >= min_p) & (torch.arange(values.shape[1], device=values.device) < top_k)
    cumulative = (weights * kept).cumsum(-1)
    needed = top_p * cumulative[:, -1:]
    last = (cumulative < needed).sum(-1, keepdim=True)
    target = uniform * cumulative.gather(1, last)
    chosen = (cumulative <= target).sum(-1, keepdim=True).minimum(last)
    return ids.gather(1, chosen).squeeze(1)


def to_weights_(logits: Tensor, best: Tensor, inverse_temperature: Tensor | None, min_p: Tensor | None) -> Tensor:
    """Turn logits `[R, V]` in place into probabilities relative to the best token's, 0 for tokens that min-p drops.

    `best`, `inverse_temperature` and `min_p` are float32 `[R, 1]`; None means a temperature of 1, or no min-p.
    """
    weights = logits.sub_(best)
    if inverse_temperature is not None:
        weights.mul_(inverse_temperature)
    # Below the least normal number there is no probability: torch's exp takes up to thirty times as long for such results, of
    # low temperatures, and four times for those of tokens that are forbidden.
    weights.clamp_(min=_LEAST_LOG).exp_()
    torch.threshold_(weights, _LEAST_WEIGHT, 0.0)
    # The comparison gives floats, for torch multiplies floats by bools several times slower.
    return weights if min_p is None else weights.mul_(torch.ge(weights, min_p, out=torch.empty_like(weights)))


def sample_by_weight(weights: Tensor, sums: Tensor, rows: Tensor, uniform: Tensor) -> Tensor:
    """Sample each of `rows` (int64 `[R]`) in proportion to `weights` `[N, V]` with its block sums: ids int64 `[R]`.

    `uniform`: float64 `[R, 1]`. A token of weight 0 is never chosen.
    """
    cumulative = sums.index_select(0, rows).cumsum(-1)
    target = _below(uniform * cumulative[:, -1:], cumulative[:, -1:])
    block = (cumulative <= target).sum(-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = _blocks_of(weights, rows, block.squeeze(1)).double().cumsum(-1)
    target = _below((target - before).clamp_(min=0.0), inside[:, -1:])
    token = (inside <= target).sum(-1).clamp_(max=BLOCK - 1)
    return block.squeeze(1) * BLOCK + token


def sample_top_p_by_rejection(weights: Tensor, top_p: Tensor, draw: Callable[[int, list[int]], Tensor]) -> Tensor:
    """Sample each row of `weights` `[R, V]` among its shortest beginning that weighs `top_p` float64 `[R, 1]`: ids `[R]`.

    By rejection: a token drawn from all is in that beginning if the tokens before it weigh less than asked for. If not, it
    and all that come after it in the order are taken out, and another one is drawn from the rest: at most a share of
    1 - top_p of first draws, and each draw takes about half of what is still too much away. One look at the vocabulary a
    draw, where finding the beginning itself would take thirty, or a sort. `KernelBackend.sample_top_p_by_rejection` samples
    the same tokens in one operation.

    `draw(attempt, rows)` returns float64 `[len(rows), 1]` in [0, 1): fresh numbers for these of the R rows.
    """
    rows = torch.arange(len(weights), device=weights.device)
    pending = rows.tolist()
    token_ids = torch.empty_like(rows)
    sums = block_sums(weights)
    needed = top_p * sums.sum(-1, keepdim=True)
    for attempt in itertools.count():
        chosen = sample_by_weight(weights, sums, torch.arange(len(pending), device=rows.device), draw(attempt, pending))
        token_ids.index_copy_(0, rows, chosen)
        better = _keep_better(weights, chosen)
        sums = block_sums(better)
        rejected = (sums.sum(-1, keepdim=True) >= needed).squeeze(1).nonzero().squeeze(1)
        if not len(rejected):
            break
        rows, needed = rows.index_select(0, rejected), needed.index_select(0, rejected)
        weights, sums = better.index_select(0, rejected), sums.index_select(0, rejected)
        pending = rows.tolist()
    return token_ids


def _keep_better(weights: Tensor, token_ids: Tensor) -> Tensor:
    """A copy of `weights` `[R, V]`, 0 where a token does not come before the row's `token_ids` int64 `[R]` in the order.

    Of equals, those with lower ids come before: so blocks before the token's own are compared with `>=`, those after it
    with `>`, and its own block, a single one, is seen to apart.
    """
    weight = weights.gather(1, token_ids.unsqueeze(1))
    blocks, own_block = weights.view(len(weights), -1, BLOCK), (token_ids // BLOCK).unsqueeze(1)
    just_below = torch.nextafter(weight, torch.full_like(weight, -1.0))
    is_before = torch.arange(blocks.shape[1], device=weights.device) < own_block
    better = torch.empty_like(blocks)
    torch.gt(blocks, torch.where(is_before, just_below, weight).unsqueeze(-1), out=better)
    every = torch.arange(len(weights), device=weights.device)
    own = _blocks_of(weights, every, own_block.squeeze(1))
    lower = torch.arange(BLOCK, device=weights.device) < (token_ids % BLOCK).unsqueeze(1)
    ties = ((own == weight) & lower).to(better.dtype)
    better.view(-1, BLOCK).index_add_(0, every * blocks.shape[1] + own_block.squeeze(1), ties)
    return better.view_as(weights).mul_(weights)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, kept under `total`, which `uniform * total` may be rounded up to."""
    return target.minimum(torch.nextafter(total, torch.zeros_like(total)))


def _blocks_of(values: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
    """The blocks of the rows: `rows` and `blocks` int64, broadcast to some shape S; returns `[*S, 64]`."""
    index = rows * (values.shape[1] // BLOCK) + blocks
    return values.view(-1, BLOCK).index_select(0, index.flatten()).view(*index.shape, BLOCK)


def _first(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` first of each row in the order of tokens: float32 values and int64 ids, `[R, count]`.

    Value and id are packed into one integer that grows with the value and falls with the id, so that `topk` finds no two
    equal and has no choice.
    """
    bits = _sortable(values.add(0.0).view(torch.int32))  # -0.0 + 0.0 is 0.0: equal numbers have equal bits
    keys = (bits.long() << 32) | (_LOW_32 - ids)
    keys = keys.topk(count, dim=-1).values
    return _sortable((keys >> 32).int()).view(torch.float32), _LOW_32 - (keys & _LOW_32)


def _sortable(bits: Tensor) -> Tensor:
    """Bits of float32 numbers to integers of the same order, and back: negative numbers have all but the sign flipped."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
