"""Log-probabilities of token ids to those of readable tokens."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda.sampling.output import TokenLogprobs
from pagoda.text.output import PositionLogprobs, TokenLogprob
from pagoda.text.tokenizer import Tokenizer


def decode_logprobs(
    tokenizer: Tokenizer, positions: Iterable[TokenLogprobs], *, are_best: bool = True
) -> list[PositionLogprobs]:
    """One entry a position. A token that is only a part of a character shows as U+FFFD and has its exact bytes.

    `are_best`: the tokens of a position are the best ones in order, and not some that were asked for.
    """
    return [_decode_position(tokenizer, position, are_best=are_best) for position in positions]


def decode_prompt_logprobs(
    tokenizer: Tokenizer, positions: Iterable[TokenLogprobs | None]
) -> list[PositionLogprobs | None]:
    """The same for a prompt, whose first token was not predicted and has no entry."""
    return [None if position is None else _decode_position(tokenizer, position) for position in positions]


def _decode_position(tokenizer: Tokenizer, position: TokenLogprobs, *, are_best: bool = True) -> PositionLogprobs:
    chosen_id, *top_ids = position.token_ids
    chosen_logprob, *top_logprobs = position.logprobs
    return PositionLogprobs(
        chosen=_decode_token(tokenizer, chosen_id, chosen_logprob, position.rank),
        top=[
            _decode_token(tokenizer, token_id, logprob, rank if are_best else None)
            for rank, (token_id, logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1)
        ],
    )


def _decode_token(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int | None) -> TokenLogprob:
    data = tokenizer.token_bytes(token_id)
    return TokenLogprob(token_id, data.decode(errors="replace"), list(data), logprob, rank)
