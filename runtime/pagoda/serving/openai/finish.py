"""Finish reasons as OpenAI's clients know them."""

from __future__ import annotations

from typing import Any

from pagoda.sampling.output import FinishReason


def finish_fields(
    reason: FinishReason | None, stop_reason: int | str | None, *, has_calls: bool = False
) -> dict[str, Any]:
    """`finish_reason` and `stop_reason` of a choice; both None while it goes on.

    OpenAI has no finish reason for output that was ended because it repeated itself: it is `length`, and `stop_reason` says
    more. An answer with calls that the model ended has `tool_calls`.
    """
    if reason is FinishReason.STOP and has_calls:
        return {"finish_reason": "tool_calls", "stop_reason": stop_reason}
    if reason is FinishReason.REPETITION:
        return {"finish_reason": str(FinishReason.LENGTH), "stop_reason": stop_reason or str(reason)}
    return {"finish_reason": None if reason is None else str(reason), "stop_reason": stop_reason}
