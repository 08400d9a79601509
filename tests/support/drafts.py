"""Drafts made by a test: the truth, nonsense, and the truth up to some point; of some requests and at some times none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from pagoda.scheduling.lookahead import MeasuredStep
from pagoda.scheduling.request import Request
from pagoda.speculation.model_proposer import ModelProposer


class ArbitraryDrafts:
    """A `Proposer` that is right as far as `random` says. `truth(tokens, count)`: the `count` ids that follow `tokens`, or
    fewer. Now and then it rests."""

    reads_along = False

    def __init__(
        self, random: Random, truth: Callable[[Request, int], Sequence[int]], vocab_size: int = 50, share: float = 0.8
    ) -> None:
        self._random = random
        self._truth = truth
        self._vocab_size = vocab_size
        self._share = share
        self.resting = 0

    def add(self, request: Request) -> None:
        request.speculates = self._random.random() < self._share

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> list[list[int]]:
        assert len(requests) <= num_outputs <= num_tokens
        assert not self.resting
        self.resting = self._random.choice([0, 0, 0, 0, 3])
        return [self._drafts(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _drafts(self, request: Request, limit: int) -> list[int]:
        assert request.speculates
        count = self._random.randint(0, max(0, min(limit, self._random.choice([0, 1, 3, 8]))))
        num_right = self._random.choice([0, count // 2, count])
        drafts = list(self._truth(request, num_right))[:num_right]
        return drafts + [self._random.randrange(self._vocab_size) for _ in range(count - len(drafts))]

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> list[int | None]:
        return [None] * len(requests)

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        raise AssertionError

    def calibrate(self, step: MeasuredStep) -> None:
        raise AssertionError

    def observe(self, step: MeasuredStep) -> None:
        assert step.num_tokens >= step.num_drafts + step.num_outputs >= 0
        assert step.seconds >= 0

    def remove(self, request: Request) -> None:
        pass


class Steady(ModelProposer):
    """Asks for as many drafts as may be, whatever they cost."""

    def wanted(self, requests, num_outputs):
        super().wanted(requests, num_outputs)
        self.resting = 0
        return [self._most if request.draft_state is not None else None for request in requests]

    def propose(self, requests, limits, num_outputs, num_tokens):
        return [self._drafts_of(request)[: max(0, limit)] for request, limit in zip(requests, limits, strict=True)]
