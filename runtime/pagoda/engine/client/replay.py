"""A request that outlives the engine it ran in: another engine goes on behind the tokens that were delivered.

Noise is keyed by a request's seed and a token's position, and a result does not depend on the batch, so the tokens that follow
are those that would have come (of requests without a seed, which get another one, others of the same distribution).
"""

from __future__ import annotations

import logging
from dataclasses import replace

from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineDeadError
from pagoda.request import EngineRequest

logger = logging.getLogger(__name__)


class Replay:
    """What of a request was delivered, and how far it is under suspicion of making engines fail.

    An engine that failed by itself while it may have been running the request counts 1, or a half where the request had
    output there: what makes an engine fail mostly does so at once, and others that ran beside it had. One that was killed by
    another process, or failed while the request was waiting, does not count. Past `max_replays` it is not replayed.
    """

    def __init__(self, request: EngineRequest, max_replays: int) -> None:
        self._request = request
        self._max_replays = max_replays
        self._num_failures = 0
        self._suspicion = 0.0
        self._output_token_ids: list[int] = []
        self._last: EngineOutput | None = None
        self._before: EngineOutput | None = None  # the last output of the engines before this one

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were delivered."""
        return len(self._output_token_ids)

    def request(self) -> EngineRequest:
        """What the next engine is to run."""
        if not self._output_token_ids:
            return self._request
        # Those of the prompt came with the first token.
        params = replace(self._request.sampling, prompt_logprobs=None)
        return replace(self._request, params=params, output_token_ids=list(self._output_token_ids))

    def deliver(self, output: EngineOutput) -> EngineOutput:
        """Take note of an output, and return it as one of the whole request."""
        self._output_token_ids += output.new_token_ids
        before = self._before
        if before is not None:
            output = replace(
                output,
                num_cached_tokens=before.num_cached_tokens,
                scheduled_time=before.scheduled_time,
                num_draft_tokens=before.num_draft_tokens + output.num_draft_tokens,
                num_accepted_tokens=before.num_accepted_tokens + output.num_accepted_tokens,
            )
        self._last = output
        return output

    def engine_failed(self, error: EngineDeadError) -> bool:
        """The engine failed with `error`: whether the request may run in another one; with `max_replays` of 0 never."""
        if not self._max_replays:
            return False
        if error.may_have_run and not error.was_killed:
            self._num_failures += 1
            self._suspicion += 1.0 if self._last is self._before else 0.5
        self._before = self._last
        if self._suspicion <= self._max_replays:
            return True
        logger.error(
            "request %s was running in %d engines that failed; it is not replayed again (max_request_replays=%d)",
            self._request.request_id,
            self._num_failures,
            self._max_replays,
        )
        return False
