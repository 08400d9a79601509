"""Values as JSON responses can hold them."""

from __future__ import annotations

from typing import Any

import pydantic_core

LOWEST_LOGPROB = -9999.0


def finite_logprob(logprob: float) -> float:
    """`logprob`, but minus infinity (a token that cannot be sampled), which is no JSON number, as `LOWEST_LOGPROB`."""
    return max(logprob, LOWEST_LOGPROB)


def arguments_object(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments are; of such that were cut off, what there is, as Anthropic's SDK reads a stream."""
    try:
        value = pydantic_core.from_json(arguments, allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}
