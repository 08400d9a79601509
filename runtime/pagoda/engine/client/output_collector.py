"""The outputs of one request that its reader has not taken yet.

They are merged into one, so the memory for a slow reader is bounded by the request's own output.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

from pagoda.engine.messages import EngineOutput
from pagoda.errors import PagodaError

T = TypeVar("T")


class RequestOutputCollector:
    """One writer (the connection to the core), one reader (the request's coroutine), on one event loop."""

    def __init__(self) -> None:
        self.has_output = False
        self._pending: EngineOutput | None = None
        self._is_merged = False  # `_pending` was made here: its `new_token_ids` are its own
        self._failure: PagodaError | None = None
        self._waiting: asyncio.Future[None] | None = None  # the reader, while there is nothing for it

    def put(self, output: EngineOutput) -> None:
        """Add an output of a step."""
        self.has_output = True
        pending = self._pending
        if pending is None:
            self._pending, self._is_merged = output, False
        elif self._is_merged and _adds_only_tokens(pending, output):
            pending.new_token_ids.extend(output.new_token_ids)
        else:
            self._pending, self._is_merged = merge(pending, output), True
        self._wake()

    def fail(self, error: PagodaError) -> None:
        """The engine has failed: the reader gets `error` after what had arrived before."""
        self._failure = error
        self._wake()

    async def get(self) -> EngineOutput:
        """What came since the last call, merged; waits for it. Raises what `fail` was given."""
        while self._pending is None:
            if self._failure is not None:
                raise self._failure
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        pending, self._pending = self._pending, None
        return pending

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def merge(earlier: EngineOutput, later: EngineOutput) -> EngineOutput:
    """Both outputs as one."""
    return replace(
        later,
        new_token_ids=earlier.new_token_ids + later.new_token_ids,
        logprobs=_joined(earlier.logprobs, later.logprobs),
        prompt_logprobs=later.prompt_logprobs if later.prompt_logprobs is not None else earlier.prompt_logprobs,
    )


def _adds_only_tokens(earlier: EngineOutput, later: EngineOutput) -> bool:
    """Whether `later` differs from `earlier` in new tokens only."""
    return (
        later.finish_reason is None
        and later.logprobs is None
        and later.prompt_logprobs is None
        and later.num_cached_tokens == earlier.num_cached_tokens
        and later.scheduled_time == earlier.scheduled_time
        and later.num_draft_tokens == earlier.num_draft_tokens
    )


def _joined(earlier: list[T] | None, later: list[T] | None) -> list[T] | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return earlier + later
