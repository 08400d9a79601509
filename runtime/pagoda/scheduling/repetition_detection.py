"""Repetition detection: an output whose tail repeats one short period.

… x y z  a b c  a b c  a b c  a b c      period 3, repeated over the whole tail
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pagoda.sampling.output import FinishReason
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.request import Request

logger = logging.getLogger(__name__)

# How many new tokens pass between two checks; makes the cost per token a fraction of a microsecond.
_CHECK_INTERVAL = 32


def repeated_period(token_ids: Sequence[int], max_period: int, min_tokens: int) -> int | None:
    """The shortest period of at most `max_period` tokens that the last `min_tokens` tokens repeat, or None.

    A period must fit at least twice into the tail.
    """
    tail = list(token_ids[-min_tokens:])
    if len(tail) < min_tokens:
        return None
    last = tail[-1]
    for period in range(1, min(max_period, min_tokens // 2) + 1):
        if tail[-1 - period] == last and tail[period:] == tail[:-period]:
            return period
    return None


class RepetitionDetector:
    """Checks outputs as they grow and, where `repetition_detection` says so, warns of repetition or ends the request.

    `num_found` counts the requests in which it was found.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.num_found = 0
        self.configure(limits)

    def configure(self, limits: SchedulerLimits) -> None:
        """Look for what `limits` say from now on."""
        self._mode = limits.repetition_detection
        self._max_period = limits.repetition_max_period
        self._min_tokens = limits.repetition_min_tokens

    def check(self, request: Request) -> None:
        """Check a request that has just got a token; may set its `finish_reason`."""
        if (len(request.token_ids) - request.num_prompt_tokens) % _CHECK_INTERVAL or self._mode == "off":
            return
        if request.is_repetitive or request.finish_reason is not None:
            return
        output = request.token_ids[max(request.num_prompt_tokens, request.num_tokens - self._min_tokens) :]
        period = repeated_period(output, self._max_period, self._min_tokens)
        if period is None:
            return
        request.is_repetitive = True
        self.num_found += 1
        stops = self._mode == "stop"
        logger.warning(
            "request %s repeats %d tokens over its last %d%s",
            *(request.spec.request_id, period, self._min_tokens, ": it is ended" if stops else ""),
        )
        if stops:
            request.finish_reason = FinishReason.REPETITION
