"""Log-probabilities of a token, and finish reasons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended. Exactly one reaches the client for every accepted request (docs/architecture.md, invariant 2)."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: first the token there, then the top-k by falling value, or those asked for.

    `token_ids` and `logprobs` have equal length (1 + k); `rank` is the 1-based rank of the first.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int
