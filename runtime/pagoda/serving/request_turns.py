"""How many requests begin in one iteration of the event loop, so that no tenant's requests keep another's waiting.

An iteration runs all that is ready before anything that becomes ready meanwhile: with thousands of one tenant's requests
at hand, even ones that are refused, each step of another's request would wait until a step of all of them is done.
"""

from __future__ import annotations

import asyncio
import sys

from pagoda.fair_turns import FairTurns
from pagoda.serving.auth.keys import ApiKey

MAX_STARTS = 4
"""One costs about half a millisecond until it is refused, or in the engine."""


class RequestTurns:
    """Lets requests begin, by tenant in turn; at once unless many do."""

    def __init__(self) -> None:
        # Connections have a bound, and with it those that wait.
        self._turns = FairTurns(MAX_STARTS, sys.maxsize, "their turn to begin")

    async def begin(self, caller: ApiKey) -> None:
        """Wait for the turn of a request of `caller`."""
        await self._turns.take(caller.tenant, caller.limits.weight)
        asyncio.get_running_loop().call_soon(self._turns.give_back)
