"""An engine client whose tokens are known, for tests of the layers above it: no torch, no process, milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.interface import EngineClient
from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue
from pagoda.engine.health import EngineState
from pagoda.engine.messages import EngineOutput, EngineReady, EngineStats
from pagoda.errors import EngineDeadError, EngineNotReadyError, ErrorKind, PagodaError, QueueFullError, error_of
from pagoda.parallel.rank_health import RankHealth
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason, TokenLogprobs


class FakeEngineClient(EngineClient):
    """Answers a prompt with its own tokens from the front, over and over, until the length limit or a stop token.

    Knobs: `step_seconds` between tokens; `hold`, cleared, stops every request before its next token; `fail_after` ends each
    request with an error after so many tokens; `max_requests` bounds what may run; `num_cached_tokens` is what every prompt
    is said to have found; `may_load`, cleared, keeps a start waiting, and `load_error` ends it; `script`, if set, is answered
    in place of the prompt's tokens, and ends with a stop. Records: `submitted` requests, and the ids of those that were
    `aborted`, which is closed by the reader or cancelled before they were finished.
    """

    stats = EngineStats()
    ranks: list[RankHealth] = []  # noqa: RUF012

    def __init__(self, *, max_model_len: int = 128, vocab_size: int = 512) -> None:
        super().__init__()
        self._limits = EngineReady(
            max_model_len=max_model_len,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            num_blocks=100,
            block_size=16,
            vocab_size=vocab_size,
            kv_equation="none",
        )
        self.step_seconds = 0.0
        self.num_resets = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.load_error: PagodaError | None = None
        self.reconfigure_error: PagodaError | None = None
        self.settings: dict[str, Any] = {}
        self.fail_after: tuple[int, ErrorKind] | None = None
        self.max_requests: int | None = None
        self.num_cached_tokens = 0
        self.script: list[int] | None = None
        self.submitted: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.adapters: list[LoraAdapter] = []  # that are loaded
        self.num_running = 0
        self._queue = RequestQueue()  # places that are kept

    async def start(self) -> None:
        if self.health.state in (EngineState.UNLOADED, EngineState.DEAD):
            self.health.load("loading")
        if self.load_error is not None:
            self.health.transition(EngineState.DEAD, str(self.load_error))
            raise self.load_error
        await self.may_load.wait()
        self.ready = self._limits
        self.health.transition(EngineState.READY, "started")

    async def load_adapter(self, adapter: LoraAdapter) -> None:
        self.adapters.append(adapter)

    def unload_adapter(self, adapter: LoraAdapter) -> None:
        if adapter in self.adapters:  # else it has not been read yet
            self.adapters.remove(adapter)

    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        self._check(count)
        return QueuePlaces(self._queue, tenant, count)

    def _check(self, count: int) -> None:
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError("the engine is dead")
        if not self.health.accepts_requests:
            raise EngineNotReadyError("the engine is not ready")
        if self.max_requests is not None and self.num_running + self._queue.num_requests + count > self.max_requests:
            raise QueueFullError("the queue is full", retry_after_seconds=7)

    async def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        self._check(0 if places is not None or request.has_place else 1)
        if places is not None:
            places.take()
        self.submitted.append(request)
        self.num_running += 1
        self.stats = EngineStats(num_running=self.num_running)
        is_over = False
        try:
            for position in range(len(request.output_token_ids), request.max_tokens):
                await self._wait(request, position)
                tokens = request.prompt_token_ids if self.script is None else [*self.script, *request.eos_token_ids[:1]]
                token_id = tokens[position % len(tokens)]
                reason, stop_reason = self._reason(request, position, token_id)
                is_over = reason is not None
                yield EngineOutput(
                    request_id=request.request_id,
                    new_token_ids=[token_id],
                    logprobs=self._logprobs(request, token_id),
                    prompt_logprobs=self._prompt_logprobs(request) if position == 0 else None,
                    finish_reason=reason,
                    stop_reason=stop_reason,
                    num_cached_tokens=self.num_cached_tokens,
                    scheduled_time=request.arrival_time,
                )
                if is_over:
                    return
        finally:
            self.num_running -= 1
            self.stats = EngineStats(num_running=self.num_running)
            if not is_over:
                self.aborted.append(request.request_id)

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    def configure(self, config: PagodaConfig) -> None:
        self.config = config

    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        if self.reconfigure_error is not None:
            raise self.reconfigure_error
        self.settings |= settings

    async def sleep(self, level: int) -> None:
        if self.num_running:
            raise EngineNotReadyError("requests are running")
        self.health.transition(EngineState.SLEEPING, f"level {level}")
        self.sleep_level = level

    async def wake_up(self) -> None:
        if self.health.state is EngineState.SLEEPING:
            self.health.transition(EngineState.STARTING, "waking up", is_expected=True)
            await self.may_load.wait()
            self.sleep_level = 0
            self.health.transition(EngineState.READY, "awake")

    async def unload(self, cause: str) -> None:
        self.ready = None
        self.health.unload(cause)

    async def shutdown(self) -> None:
        self.health.transition(EngineState.DEAD, "shut down")

    async def _wait(self, request: EngineRequest, position: int) -> None:
        await asyncio.sleep(self.step_seconds)
        await self.hold.wait()
        if self.health.state is EngineState.DEAD:
            raise EngineDeadError("the engine died while the request was in it")
        if self.fail_after is not None and position >= self.fail_after[0]:
            raise error_of(self.fail_after[1], "failed as asked")

    @staticmethod
    def _reason(request: EngineRequest, position: int, token_id: int) -> tuple[FinishReason | None, int | None]:
        if position + 1 >= request.max_tokens:
            return FinishReason.LENGTH, None
        if token_id in request.params.stop_token_ids:
            return FinishReason.STOP, token_id
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return FinishReason.STOP, None
        return None, None

    @staticmethod
    def _logprobs(request: EngineRequest, token_id: int) -> list[TokenLogprobs] | None:
        count = request.params.logprobs
        return None if count is None else [_position(token_id, count)]

    @staticmethod
    def _prompt_logprobs(request: EngineRequest) -> list[TokenLogprobs | None] | None:
        count = request.params.prompt_logprobs
        if count is None:
            return None
        return [None, *(_position(token_id, count) for token_id in request.prompt_token_ids[1:])]


def _position(token_id: int, count: int) -> TokenLogprobs:
    """`count` candidates with ids from `token_id` up, the token itself the most probable."""
    top = [token_id + offset for offset in range(count)]
    return TokenLogprobs([token_id, *top], [-0.5, *(-0.5 - offset for offset in range(count))], rank=1)
