"""What the text layer gives back: pieces of text with the tokens they came from. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagoda.sampling.output import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate token at one position.

    `token` is readable (bytes that are no character alone show as U+FFFD); `bytes` are the exact bytes the token adds to the
    output, so that the bytes of neighbours can be joined to whole characters. `rank` is 1 for the most probable token.
    """

    token_id: int
    token: str
    bytes: list[int]
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token that stands at a position, and the most probable ones there by falling log-probability."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """News of choice `index` (0 .. n-1) of one request.

    `text` and `token_ids` are what is new; joined over all chunks of an index they are the whole completion. Text that may
    still turn out to be half a character or the start of a stop string is held back, so a chunk may bring ids and no text,
    and the last one text and no ids. `logprobs` has one entry for each of `token_ids` if they were asked for.
    `finish_reason` is set on the last chunk of an index and only there; `stop_reason` is then the stop string or the id of
    `stop_token_ids` that ended it, None when an end-of-sequence token or the length did.

    Only on the first chunk of an index: `num_prompt_tokens`, `prompt_token_ids`, `prompt_logprobs` (if asked for; the first
    entry is None), `num_cached_tokens` (prompt tokens found in the prefix cache) and `scheduled_time` (monotonic seconds).
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    scheduled_time: float | None = None
