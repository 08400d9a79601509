"""Drafts made by a test: the truth, nonsense, and the truth up to some point; of some requests and at some times none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from pagoda.scheduling.request import Request


class ArbitraryDrafts:
    """A `Proposer` that is right as far as `random` says. `truth(tokens, count)`: the `count` ids that follow `tokens`, or
    fewer."""

    def __init__(
        self, random: Random, truth: Callable[[Request, int], Sequence[int]], vocab_size: int = 50, share: float = 0.8
    ) -> None:
        self._random = random
        self._truth = truth
        self._vocab_size = vocab_size
        self._share = share

    def add(self, request: Request) -> None:
        request.waits_for_output |= self._random.random() < self._share

    def choose(self, requests: list[Request], num_other_tokens: int) -> list[int]:
        assert num_other_tokens >= len(requests)
        return [self._random.choice([0, 1, 3, 8]) for _ in requests]

    def propose(self, request: Request, limit: int) -> list[int]:
        assert limit >= 1
        assert request.waits_for_output
        count = self._random.randint(0, limit)
        num_right = self._random.choice([0, count // 2, count])
        drafts = list(self._truth(request, num_right))[:num_right]
        return drafts + [self._random.randrange(self._vocab_size) for _ in range(count - len(drafts))]

    def remove(self, request: Request) -> None:
        pass
