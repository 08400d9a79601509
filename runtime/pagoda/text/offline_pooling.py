"""Vectors and scores without a server: requests into the engine of this process, outputs out of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pagoda.adapters import LoraAdapter
from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineOutput, EngineOutputs, EngineReady
from pagoda.errors import InvalidRequestError, NotSupportedError, PagodaError, QueueFullError
from pagoda.models.pooling_config import read_model, read_pooler
from pagoda.pooling.output import PooledOutput
from pagoda.pooling.params import EMBED, SCORE, PoolingParams
from pagoda.pooling.similarity import cosine_similarity
from pagoda.request import EngineRequest, PoolingRequest
from pagoda.text.output import PoolingOutput
from pagoda.text.pooling_prompts import PoolingPrompts
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.validation import RequestLimits, check_pooled_prompt, pooling_request

Prompt = str | list[int]


class Core(Protocol):
    """What is needed of `EngineCore`."""

    ready: EngineReady

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""

    def add_request(self, request: EngineRequest) -> None:
        """Accept a request."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Abort requests."""

    def step(self) -> EngineOutputs:
        """Run one turn of the loop."""


class OfflinePooler:
    """Pools texts in the engine `core`. Used from one thread."""

    def __init__(
        self, core: Core, tokenizer: Tokenizer, config: PagodaConfig, step: Callable[[], EngineOutputs]
    ) -> None:
        """`step`: runs one step of `core`."""
        assert config.model is not None
        pooler = read_pooler(config, config.model, read_model(config.model, model_impl=config.model_impl))
        assert pooler is not None, "the model generates"
        self._pooler = pooler
        self._core = core
        self._step = step
        self._tokenizer = tokenizer
        self._limits = RequestLimits(max_model_len=core.ready.max_model_len, vocab_size=core.ready.vocab_size)
        self._numbers = itertools.count()
        self.prompts = PoolingPrompts.of(config.model, config.rerank_template)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's outputs."""
        return self._pooler.labels

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt] | Sequence[tuple[str, str]],
        params: PoolingParams,
        *,
        before: str = "",
        truncate_prompt_tokens: int | None = None,
        adapter: LoraAdapter | None = None,
    ) -> list[PoolingOutput]:
        """Pool all prompts, batched; a tuple is a pair that is read together. `before` is put before each text. `adapter`:
        what computes them.

        Raises `InvalidRequestError` before anything runs.
        """
        params = params.checked(self._pooler.tasks, self._pooler.size, self._pooler.dimensions)
        outputs: list[PoolingOutput] = []
        requests: list[EngineRequest] = []
        for prompt in _as_list(prompts):
            output, request = self._prepare(prompt, params, before, truncate_prompt_tokens, adapter)
            outputs.append(output)
            requests.append(request)
        self._run(requests, outputs)
        return outputs

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingOutput]:
        """How well each document belongs to its query: one query for all documents, or one for each.

        By a cross-encoder or a language model, which read both together, or by the similarity of two vectors.
        """
        pairs = text_pairs(queries, documents)
        if self._pooler.score_tokens:
            texts = [self.prompts.rerank(query, document, instruction) for query, document in pairs]
            return self.encode(texts, PoolingParams(SCORE), truncate_prompt_tokens=truncate_prompt_tokens)
        if SCORE in self._pooler.tasks:
            return self.encode(pairs, PoolingParams(SCORE), truncate_prompt_tokens=truncate_prompt_tokens)
        if EMBED not in self._pooler.tasks:
            raise NotSupportedError(f"this model cannot score; it is served for {', '.join(self._pooler.tasks)}")
        unique = list(dict.fromkeys(query for query, _ in pairs))
        params = PoolingParams(EMBED)
        vectors = self.encode(
            unique,
            params,
            before=self.prompts.of_kind("query"),
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        by_query = dict(zip(unique, vectors, strict=True))
        others = self.encode(
            [document for _, document in pairs],
            params,
            before=self.prompts.of_kind("document"),
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        for (query, _), other in zip(pairs, others, strict=True):
            first = by_query[query].pooled
            if first is not None and other.pooled is not None:
                other.pooled = PooledOutput.of([cosine_similarity(first, other.pooled)])
        return others

    def _prepare(
        self,
        prompt: Prompt | tuple[str, str],
        params: PoolingParams,
        before: str,
        truncate: int | None,
        adapter: LoraAdapter | None,
    ) -> tuple[PoolingOutput, EngineRequest]:
        text: str | None = None
        second = params.second_segment
        limit = self._limits.max_model_len
        longest = None if truncate is None else limit if truncate < 0 else min(truncate, limit)
        if isinstance(prompt, tuple):
            text = prompt[0]
            token_ids, second = self._tokenizer.encode_whole(*prompt, max_length=longest)
        elif isinstance(prompt, str):
            text = prompt
            token_ids, second = self._tokenizer.encode_whole(before + prompt, max_length=longest)
        else:
            token_ids = list(prompt)[:longest]
        check_pooled_prompt(token_ids, self._limits)
        request_id = f"pool-{next(self._numbers)}"
        request = PoolingRequest(request_id=request_id, params=params, prompt=token_ids, adapter=adapter)
        output = PoolingOutput(request_id=request_id, prompt=text, prompt_token_ids=token_ids)
        return output, pooling_request(request, token_ids, params._replace(second_segment=second))

    def _run(self, requests: list[EngineRequest], outputs: list[PoolingOutput]) -> None:
        waiting = deque(requests)
        running = {output.request_id: output for output in outputs}
        try:
            while running:
                self._submit_some(waiting, running)
                for output in self._step().outputs:
                    own = running.pop(output.request_id, None)
                    if own is not None:
                        _take(own, output)
        finally:
            self._core.abort(list(running))

    def _submit_some(self, waiting: deque[EngineRequest], running: dict[str, PoolingOutput]) -> None:
        """Hand requests to the engine while its queue takes them."""
        while waiting:
            try:
                self._core.add_request(waiting[0])
            except QueueFullError:
                if not self._core.has_work:
                    raise
                return
            except PagodaError as error:
                running.pop(waiting[0].request_id).error = str(error)
            waiting.popleft()


def text_pairs(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[tuple[str, str]]:
    """One query for all documents, or one for each. Raises `InvalidRequestError` where their numbers do not fit."""
    firsts = [queries] if isinstance(queries, str) else list(queries)
    seconds = [documents] if isinstance(documents, str) else list(documents)
    if not firsts or not seconds:
        raise InvalidRequestError("there is nothing to compare: give at least one text on either side")
    if len(firsts) == 1:
        firsts *= len(seconds)
    if len(firsts) != len(seconds):
        raise InvalidRequestError(
            f"there are {len(firsts)} texts on one side and {len(seconds)} on the other; give one on the first, or as many"
        )
    return list(zip(firsts, seconds, strict=True))


def _as_list(prompts: Prompt | Sequence[Prompt] | Sequence[tuple[str, str]]) -> list[Prompt | tuple[str, str]]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]  # type: ignore[arg-type]  # one prompt of ids
    return list(prompts)  # type: ignore[arg-type]


def _take(own: PoolingOutput, output: EngineOutput) -> None:
    own.pooled, own.num_cached_tokens = output.pooled, output.num_cached_tokens
    if output.pooled is None:
        own.error = output.error or f"the request ended with {output.finish_reason}"
