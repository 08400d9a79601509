"""Values as error messages and JSON responses can hold them."""

from __future__ import annotations

MAX_SHOWN_CHARACTERS = 80
LOWEST_LOGPROB = -9999.0


def shown(value: object) -> str:
    """A value of a request for an error message; containers by their type only, for they may be huge or deep."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."


def finite_logprob(logprob: float) -> float:
    """`logprob`, but minus infinity (a token that cannot be sampled), which is no JSON number, as `LOWEST_LOGPROB`."""
    return max(logprob, LOWEST_LOGPROB)
