"""What the engine has said about one request and its reader has not taken yet.

News that the reader did not take is merged with later news, so a slow reader costs at most the request's own output, however
many steps run meanwhile.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

from pagoda.engine.messages import EngineOutput
from pagoda.errors import PagodaError

T = TypeVar("T")


class Mailbox:
    """One writer (the connection to the core), one reader (the request's coroutine), on one event loop."""

    def __init__(self) -> None:
        self._pending: EngineOutput | None = None
        self._failure: PagodaError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        """Add news."""
        self._pending = output if self._pending is None else merge(self._pending, output)
        self._arrived.set()

    def fail(self, error: PagodaError) -> None:
        """The engine is lost: the reader gets `error` after what had arrived before."""
        self._failure = error
        self._arrived.set()

    async def get(self) -> EngineOutput:
        """The news since the last call; waits for some. Raises what `fail` was given."""
        await self._arrived.wait()
        if self._pending is None:
            assert self._failure is not None
            raise self._failure
        pending, self._pending = self._pending, None
        if self._failure is None:
            self._arrived.clear()
        return pending


def merge(earlier: EngineOutput, later: EngineOutput) -> EngineOutput:
    """One output that says what both say."""
    return replace(
        later,
        new_token_ids=earlier.new_token_ids + later.new_token_ids,
        logprobs=_joined(earlier.logprobs, later.logprobs),
        prompt_logprobs=later.prompt_logprobs if later.prompt_logprobs is not None else earlier.prompt_logprobs,
    )


def _joined(earlier: list[T] | None, later: list[T] | None) -> list[T] | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return earlier + later
