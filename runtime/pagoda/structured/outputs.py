"""The constrained outputs of an engine: grammars compiled beside its loop, and masks found while the model runs.

add ──▶ compile (thread) ──▶ take_compiled ──▶ scheduler …  plan ──▶ mask ──▶ forward ┬──▶ fill a few ──▶ sampling
                                                                      └──▶ fill many (thread) ──┘
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from pagoda.errors import ConfigError, NotSupportedError, PagodaError, RequestFailedError
from pagoda.request import EngineRequest
from pagoda.scheduling.plan import StepPlan, TokenMasks
from pagoda.scheduling.request import Request
from pagoda.structured.compiler import GrammarCompiler
from pagoda.structured.matcher import OutputMatcher, TextMatcher, Words
from pagoda.structured.reasoning import Reasoning
from pagoda.structured.vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)

# Fewer are found when they are needed: handing them to a thread costs as much as some ten masks. On a GPU that is while the
# forward pass runs as well.
_MIN_MASKS_FOR_A_THREAD = 8


class _Compiling(NamedTuple):
    request: EngineRequest
    result: Future[OutputMatcher]


class StructuredOutputs:
    """Not thread-safe: driven by the engine's loop. `load` reads the vocabulary; it is called at once, in a thread.

    Nothing waits for that but the requests that need it: it takes a second for 150 000 tokens, in which others are served.
    `vocab_size`: of the model, so many logits there are.
    """

    def __init__(self, load: Callable[[], GrammarVocabulary], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._compile = ThreadPoolExecutor(1, "grammar-compiler")
        self._fill = ThreadPoolExecutor(1, "grammar-masks")
        self._compiler: Future[GrammarCompiler] = self._compile.submit(lambda: GrammarCompiler(load()))
        self._compiler.add_done_callback(_log_failure)
        self._compiling: dict[str, _Compiling] = {}

    @property
    def num_compiling(self) -> int:
        """Requests whose grammars are being compiled."""
        return len(self._compiling)

    def add(self, request: EngineRequest) -> OutputMatcher | None:
        """The request's matcher, if its grammar has been compiled before; else None, and it comes from `take_compiled`."""
        spec = request.sampling.structured_outputs
        assert spec is not None
        compiler = self._compiler
        if (
            not self._compiling
            and compiler.done()
            and compiler.exception() is None
            and compiler.result().is_cached(spec)
        ):
            return self._matcher(request)
        self._compiling[request.request_id] = _Compiling(request, self._compile.submit(self._matcher, request))
        return None

    def discard(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests whose grammars are being compiled; returns those that there were."""
        return [request_id for request_id in request_ids if self._compiling.pop(request_id, None) is not None]

    def take_compiled(self, seconds: float = 0.0) -> list[tuple[EngineRequest, OutputMatcher | PagodaError]]:
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
            matcher = request.constraint
            if isinstance(matcher, OutputMatcher) and plan.samples[row]:
                own_drafts = plan.draft_token_ids.get(row, [])
                if matcher.restricts(1 + len(own_drafts)):
                    rows.append(row)
                    matchers.append(matcher)
                    drafts.append(own_drafts)
        if rows:
            words = np.empty((len(rows) + sum(map(len, drafts)), matchers[0].num_words), dtype=np.int32)
            find = partial(_fill, matchers, drafts, words)
            settle = find if len(words) < _MIN_MASKS_FOR_A_THREAD else self._fill.submit(find).result
            plan.token_masks = _PendingMasks(rows, settle, self._num_words)

    def shutdown(self) -> None:
        """End the threads."""
        self._compile.shutdown(wait=False, cancel_futures=True)
        self._fill.shutdown()

    def _matcher(self, request: EngineRequest) -> OutputMatcher:
        params, spec = request.sampling, request.sampling.structured_outputs
        assert spec is not None
        if not spec.has_grammar and len(spec.starts_after) == 1 and self._compiler.exception() is not None:
            return TextMatcher(self._vocab_size, Reasoning(spec, lambda _: b""))  # that needs no vocabulary
        return self._compiler.result().matcher(
            spec,
            eos_token_ids=request.eos_token_ids,
            stop_token_ids=params.stop_token_ids,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
        )


def _log_failure(compiler: Future[GrammarCompiler]) -> None:
    """What is wrong with a vocabulary concerns requests that need it only."""
    if not compiler.cancelled() and (error := compiler.exception()) is not None:
        logger.info("no structured outputs: %s", error)


class _PendingMasks(TokenMasks):
    """Masks that `settle` finds, or waits for."""

    def __init__(self, rows: list[int], settle: Callable[[], Words], num_words: int) -> None:
        super().__init__(rows)
        self._settle = settle
        self._num_words = num_words

    @override
    def settled(self) -> TokenMasks:
        words = self._settle()
        if words.shape[1] > self._num_words:
            words = np.ascontiguousarray(words[:, : self._num_words])
        return TokenMasks(self.rows, words.data.cast("B"))


def _fill(matchers: list[OutputMatcher], drafts: list[list[int]], words: Words) -> Words:
    first, address = 0, words.ctypes.data
    for matcher, own_drafts in zip(matchers, drafts, strict=True):
        end = first + 1 + len(own_drafts)
        matcher.fill(words[first:end], own_drafts, address + first * matcher.num_bytes)
        first = end
    return words


def _outcome(result: Future[OutputMatcher]) -> OutputMatcher | PagodaError:
    error = result.exception()
    if error is None:
        return result.result()
    if isinstance(error, ConfigError):  # of the vocabulary
        return NotSupportedError(str(error))
    if isinstance(error, PagodaError):
        return error
    return RequestFailedError(f"the grammar could not be compiled: {error!r}")
