"""What is known of one generated sequence when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class EndedRequest(NamedTuple):
    """One of a request's `n` sequences; `request` is the engine's id of it, without what the engine adds.

    Seconds: `ttft` from arrival to the first token, `tpot` for each further one, `e2el` from arrival to the end, `queue` from
    arrival to the first step; None where it did not come so far. `cause`: of an abort, one of `ABORT_CAUSES`.
    """

    request: str
    ttft: float | None
    tpot: float | None
    e2el: float
    queue: float | None
    prompt_tokens: int | None
    cached_tokens: int
    output_tokens: int
    reason: str
    cause: str | None


EndListener = Callable[[EndedRequest], None]
