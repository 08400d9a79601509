"""A scheduler whose steps take virtual time: `fixed` seconds, and `per_token` for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.request import Request
from pagoda.scheduling.scheduler import Scheduler
from tests.support.requests import make_request
from tests.support.virtual_time import Clock

LIMITS = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "max_model_len": 16384, "max_num_waiting": 1024}


class TimedEngine:
    """`token_times[id]`: when each token of a request was there. `num_usable`: KV blocks of 16 tokens. `noise`: a factor
    of each step's time.
    """

    def __init__(
        self,
        *,
        fixed: float = 10.0,
        per_token: float = 1.0,
        num_usable: int = 8192,
        caching: bool = True,
        watermark: float = 0.02,
        noise: Callable[[], float] = lambda: 1.0,
        **limits: Any,
    ) -> None:
        self.clock = Clock()
        self._fixed = fixed
        self._per_token = per_token
        self._noise = noise
        self.kv = KVCacheManager(num_usable + 1, 16, enable_prefix_caching=caching, watermark=watermark)
        self.scheduler = Scheduler(SchedulerLimits(**{**LIMITS, **limits}), self.kv, self.clock)
        self.token_times: dict[str, list[float]] = {}
        self.requests: dict[str, Request] = {}
        self.num_tokens_run = 0
        self.plans: list[StepPlan] = []

    def add(self, tenant: str, num_prompt_tokens: int, max_tokens: int, **fields: Any) -> Request:
        """Send a request with a prompt like no other."""
        number = len(self.requests)
        request = make_request(
            f"{tenant}{number}",
            num_prompt_tokens,
            first=100_000 * number,
            max_tokens=max_tokens,
            tenant=tenant,
            arrival_time=self.clock(),
            **fields,
        )
        self.scheduler.add(request)
        self.requests[request.spec.request_id] = request
        self.token_times[request.spec.request_id] = []
        return request

    def step(self) -> bool:
        """Run a step; False: there was nothing to do."""
        plan = self.scheduler.schedule()
        if plan is None:
            assert not self.scheduler.has_work, "requests wait, and nothing can run"
            return False
        self.plans.append(plan)
        self.num_tokens_run += plan.total_tokens
        self.clock.advance((self._fixed + self._per_token * plan.total_tokens) * self._noise())
        result = StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples])
        for update in self.scheduler.apply(plan, result):
            self.token_times[update.request.spec.request_id] += [self.clock()] * len(update.new_token_ids)
        return True

    def run_until(self, is_done: Callable[[], bool], max_steps: int = 100_000) -> int:
        """Run steps, and count them."""
        for number in range(max_steps):
            if is_done():
                return number
            assert self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def seconds_of(self, tenant: str, num_prompt_tokens: int, max_tokens: int, **fields: Any) -> float:
        """Send a request now and run until it has ended: how long that takes."""
        request = self.add(tenant, num_prompt_tokens, max_tokens, **fields)
        began = self.clock()
        self.run_until(lambda: request.is_finished)
        return self.clock() - began

    def seconds_alone(self, num_prompt_tokens: int, max_tokens: int) -> float:
        """How long such a request takes in an engine that has nothing else to do."""
        alone = TimedEngine(fixed=self._fixed, per_token=self._per_token)
        return alone.seconds_of("alone", num_prompt_tokens, max_tokens)

    def seconds_of_step(self, num_tokens: int) -> float:
        """How long a step of so many tokens takes."""
        return self._fixed + self._per_token * num_tokens
