"""The constrained outputs of an engine: grammars compiled beside its loop, and masks found while the model runs.

add ──▶ compile (thread) ──▶ take_compiled ──▶ scheduler …  plan ──▶ mask ──▶ forward ┬──▶ sampling
                                                                      └──▶ fill (thread) ──┘
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from pagoda.errors import ConfigError, NotSupportedError, PagodaError, RequestFailedError
from pagoda.request import EngineRequest
from pagoda.scheduling.plan import StepPlan, TokenMasks
from pagoda.scheduling.request import Request
from pagoda.structured.compiler import GrammarCompiler
from pagoda.structured.matcher import GrammarMatcher, Words
from pagoda.structured.vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)


class _Compiling(NamedTuple):
    request: EngineRequest
    result: Future[GrammarMatcher]


class StructuredOutputs:
    """Not thread-safe: driven by the engine's loop. `load` reads the vocabulary; it is called at once, in a thread.

    `vocab_size`: of the model, so many logits there are.
    """

    def __init__(self, load: Callable[[], GrammarVocabulary], vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._compile = ThreadPoolExecutor(1, "grammar-compiler")
        self._fill = ThreadPoolExecutor(1, "grammar-masks")
        self._compiler: Future[GrammarCompiler] = self._compile.submit(lambda: GrammarCompiler(load()))
        self._compiling: dict[str, _Compiling] = {}
        self._num_matchers = 0

    def wait_until_loaded(self) -> None:
        """Wait for the vocabulary; what is wrong with it concerns requests that need it only."""
        error = self._compiler.exception()
        if error is not None:
            logger.info("no structured outputs: %s", error)

    @property
    def num_compiling(self) -> int:
        """Requests whose grammars are being compiled."""
        return len(self._compiling)

    def add(self, request: EngineRequest) -> None:
        """Compile the request's grammar; it comes back from `take_compiled`."""
        self._compiling[request.request_id] = _Compiling(request, self._compile.submit(self._matcher, request))

    def discard(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests whose grammars are being compiled; returns those that there were."""
        return [request_id for request_id in request_ids if self._compiling.pop(request_id, None) is not None]

    def take_compiled(self, seconds: float = 0.0) -> list[tuple[EngineRequest, GrammarMatcher | PagodaError]]:
        """The requests whose grammars are compiled, or cannot be, and why; waits up to `seconds` for a first one."""
        if not self._compiling:
            return []
        waiting = [each.result for each in self._compiling.values()]
        if seconds > 0:
            wait(waiting, seconds, FIRST_COMPLETED)
        done = [each for each in self._compiling.values() if each.result.done()]
        for request, _ in done:
            del self._compiling[request.request_id]
        return [(request, _outcome(result)) for request, result in done]

    def mask(self, plan: StepPlan, requests: Sequence[Request]) -> None:
        """Give `plan`, whose rows are those of `requests`, the masks of its constrained rows; they are filled meanwhile."""
        rows, matchers, drafts = [], [], []
        for row, request in enumerate(requests):
            if isinstance(request.constraint, GrammarMatcher) and plan.samples[row]:
                rows.append(row)
                matchers.append(request.constraint)
                drafts.append(plan.draft_token_ids.get(row, []))
        if rows:
            words = np.empty((len(rows) + sum(map(len, drafts)), matchers[0].num_words), dtype=np.int32)
            plan.token_masks = _PendingMasks(rows, self._fill.submit(_fill, matchers, drafts, words), self._num_words)

    def shutdown(self) -> None:
        """End the threads."""
        self._compile.shutdown(wait=False, cancel_futures=True)
        self._fill.shutdown()

    def _matcher(self, request: EngineRequest) -> GrammarMatcher:
        params = request.params
        assert params.structured_outputs is not None
        return self._compiler.result().matcher(
            params.structured_outputs,
            eos_token_ids=request.eos_token_ids,
            stop_token_ids=params.stop_token_ids,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
        )


class _PendingMasks(TokenMasks):
    """Masks that a thread fills."""

    def __init__(self, rows: list[int], filling: Future[Words], num_words: int) -> None:
        super().__init__(rows)
        self._filling = filling
        self._num_words = num_words

    @override
    def settled(self) -> TokenMasks:
        return TokenMasks(self.rows, self._filling.result()[:, : self._num_words].tobytes())


def _fill(matchers: list[GrammarMatcher], drafts: list[list[int]], words: Words) -> Words:
    first = 0
    for matcher, own_drafts in zip(matchers, drafts, strict=True):
        end = first + 1 + len(own_drafts)
        matcher.fill(words[first:end], own_drafts)
        first = end
    return words


def _outcome(result: Future[GrammarMatcher]) -> GrammarMatcher | PagodaError:
    error = result.exception()
    if error is None:
        return result.result()
    if isinstance(error, ConfigError):  # of the vocabulary
        return NotSupportedError(str(error))
    if isinstance(error, PagodaError):
        return error
    return RequestFailedError(f"the grammar could not be compiled: {error!r}")
