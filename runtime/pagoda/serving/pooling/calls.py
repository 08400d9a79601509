"""From requests to jobs, and from what came of them to answers."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from pagoda.errors import EngineNotReadyError, InvalidRequestError, NotSupportedError, shown
from pagoda.pooling.output import PooledOutput
from pagoda.pooling.params import CLASSIFY, EMBED, SCORE, PoolingParams
from pagoda.pooling.similarity import cosine_similarity
from pagoda.request import PoolingRequest, TokenIds
from pagoda.serving.generation import limit_time
from pagoda.serving.models import MAX_POOLED_PER_REQUEST, ServedModel
from pagoda.serving.pooling.types import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingBody,
    PoolingFields,
    RerankRequest,
    ScoreRequest,
)
from pagoda.text.offline_pooling import text_pairs
from pagoda.text.output import CompletionOutput
from pagoda.text.pooling import TextPooler

_NUMBERS_INLINE = 1 << 15
"""Numbers that are written on the event loop; more are, one vector after the other, beside it."""


def pooler_of(model: ServedModel) -> TextPooler:
    """The text layer of a model that pools. Raises `NotSupportedError` for one that generates."""
    generator = model.runner.generator
    if not isinstance(generator, TextPooler):
        raise NotSupportedError(
            "this model generates; a server started with --task embed, classify or score serves this route", "model"
        )
    return generator


class PoolingCall:
    """A checked request: its jobs, and the envelope of its answer."""

    id_prefix = "pool"

    def __init__(self, model: ServedModel, body: PoolingFields, seconds: float | None) -> None:
        self._model = model
        self._pooler = pooler_of(model)
        self._body = body
        self._seconds = seconds
        self.response_id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def job(self, params: PoolingParams, **fields: Any) -> PoolingRequest:
        """One job with what all requests may say."""
        body = self._body
        request = PoolingRequest(
            params=self._pooler.check(params),
            priority=body.priority or 0,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            timeout_seconds=body.timeout_seconds,
            **fields,
        )
        return limit_time(request, self._seconds)

    async def run(self, jobs: Sequence[PoolingRequest]) -> list[CompletionOutput]:
        """What came of the jobs, in order."""
        outputs = await self._model.runner.pool_all(jobs, self.response_id)
        for output in outputs:
            if output.pooled is None:
                raise EngineNotReadyError("the server ended the request; send it again")
        return outputs

    def envelope(self, data: list[dict[str, Any]], outputs: Sequence[CompletionOutput]) -> dict[str, Any]:
        """The answer around `data`."""
        return {
            "id": self.response_id,
            "object": "list",
            "created": self._created,
            "model": self._model.name,
            "data": data,
            "usage": usage(outputs),
        }


def usage(outputs: Sequence[CompletionOutput]) -> dict[str, Any]:
    """The tokens of all inputs."""
    count = sum(output.num_prompt_tokens for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class EmbeddingCall(PoolingCall):
    """Inputs to vectors, or to what another task makes of them."""

    id_prefix = "embd"

    def __init__(self, model: ServedModel, body: EmbeddingRequest, seconds: float | None) -> None:
        super().__init__(model, body, seconds)
        self._encoding = body.encoding_format or "float"
        self._task = body.task if isinstance(body, PoolingBody) and body.task is not None else None
        task = self._task or (self._pooler.task if isinstance(body, PoolingBody) else EMBED)
        params = PoolingParams(task, normalize=body.normalize, dimensions=body.dimensions)
        before = self._before(body)
        check_num_inputs(len(body.input))
        job = self.job(params, add_special_tokens=body.add_special_tokens is not False)
        self._jobs = [replace(job, prompt=_with(before, prompt)) for prompt in body.input]

    async def whole(self) -> bytes:
        """The answer's JSON."""
        outputs = await self.run(self._jobs)
        is_pooling = isinstance(self._body, PoolingBody)
        name, member = ("pooling", "data") if is_pooling else ("embedding", "embedding")
        numbers = await encoded([_pooled(output) for output in outputs], self._encoding)
        data = [{"object": name, "index": index, member: value} for index, value in enumerate(numbers)]
        return orjson.dumps(self.envelope(data, outputs))

    def _before(self, body: EmbeddingRequest) -> str:
        if body.input_type is None or body.prompt_name is not None:
            return self._pooler.prompts.before(body.prompt_name)
        kind = {"search_query": "query", "search_document": "document", "passage": "document"}.get(
            body.input_type, body.input_type
        )
        if kind not in ("query", "document", "classification", "clustering"):
            raise InvalidRequestError(
                f"input_type must be query or document, got {shown(body.input_type)}", "input_type"
            )
        return self._pooler.prompts.of_kind(kind)


class ClassifyCall(PoolingCall):
    """Inputs to labels."""

    id_prefix = "classify"

    def __init__(self, model: ServedModel, body: ClassifyRequest, seconds: float | None) -> None:
        super().__init__(model, body, seconds)
        check_num_inputs(len(body.input))
        params = PoolingParams(CLASSIFY, use_activation=body.use_activation)
        job = self.job(params, add_special_tokens=body.add_special_tokens is not False)
        self._jobs = [replace(job, prompt=prompt) for prompt in body.input]

    async def whole(self) -> bytes:
        """The answer's JSON."""
        outputs = await self.run(self._jobs)
        labels = self._pooler.labels
        data = []
        for index, output in enumerate(outputs):
            probs = _pooled(output).tolist()
            best = max(range(len(probs)), key=probs.__getitem__)
            data.append({"index": index, "label": labels[best], "probs": probs, "num_classes": len(probs)})
        return orjson.dumps(self.envelope(data, outputs))


class PairCall(PoolingCall):
    """Pairs of texts to scores: read together, or by the similarity of their vectors."""

    id_prefix = "score"

    def __init__(
        self,
        model: ServedModel,
        body: PoolingFields,
        seconds: float | None,
        pairs: list[tuple[str, str]],
        instruction: str | None,
    ) -> None:
        super().__init__(model, body, seconds)
        check_num_inputs(len(pairs))
        self.pairs = pairs
        pooler = self._pooler
        self._queries: dict[str, int] = {}
        if SCORE in pooler.tasks:
            job = self.job(PoolingParams(SCORE))
            if pooler.scores_tokens:
                texts = [pooler.prompts.rerank(query, document, instruction) for query, document in pairs]
                self._jobs = [replace(job, prompt=text) for text in texts]
            else:
                self._jobs = [replace(job, prompt=query, pair=document) for query, document in pairs]
            return
        if EMBED not in pooler.tasks:
            raise NotSupportedError(f"this model cannot score; it is served for {', '.join(pooler.tasks)}", "model")
        job = self.job(PoolingParams(EMBED))
        # Each query once, before the documents.
        for query, _ in pairs:
            self._queries.setdefault(query, len(self._queries))
        firsts, seconds_ = pooler.prompts.of_kind("query"), pooler.prompts.of_kind("document")
        self._jobs = [replace(job, prompt=firsts + query) for query in self._queries]
        self._jobs += [replace(job, prompt=seconds_ + document) for _, document in pairs]

    async def scores(self) -> tuple[list[float], list[CompletionOutput]]:
        """The score of each pair, and what it was made of."""
        outputs = await self.run(self._jobs)
        if not self._queries:
            return [_pooled(output).tolist()[0] for output in outputs], outputs
        documents = outputs[len(self._queries) :]
        scores = [
            cosine_similarity(_pooled(outputs[self._queries[query]]), _pooled(document))
            for (query, _), document in zip(self.pairs, documents, strict=True)
        ]
        return scores, outputs

    async def whole(self) -> bytes:
        """The answer's JSON."""
        scores, outputs = await self.scores()
        data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
        return orjson.dumps(self.envelope(data, outputs))


def score_call(model: ServedModel, body: ScoreRequest, seconds: float | None) -> PairCall:
    """The call of a score request."""
    firsts = body.queries if body.text_1 is None else body.text_1
    seconds_ = body.documents if body.text_2 is None else body.text_2
    if firsts is None or seconds_ is None:
        raise InvalidRequestError("text_1 and text_2 (or queries and documents) are required", "text_1")
    return PairCall(model, body, seconds, text_pairs(firsts, seconds_), body.instruction)


class RerankCall(PairCall):
    """Documents to an order of them."""

    id_prefix = "rerank"

    def __init__(
        self, model: ServedModel, body: RerankRequest, seconds: float | None, *, is_cohere: bool = False
    ) -> None:
        """`is_cohere`: the answer is in the form of Cohere's API, version 2."""
        documents = body.texts if body.documents is None else [_text_of(document) for document in body.documents]
        if not documents:
            raise InvalidRequestError("documents must be a list of at least one text", "documents")
        check_num_inputs(len(documents))
        if body.max_tokens_per_doc is not None and body.truncate_prompt_tokens is None:
            body = body.model_copy(update={"truncate_prompt_tokens": body.max_tokens_per_doc})
        super().__init__(model, body, seconds, [(body.query, document) for document in documents], body.instruction)
        self._request = body
        self._is_cohere = is_cohere
        self._is_bare = body.documents is None
        shows = body.return_text if self._is_bare else body.return_documents
        self._shows_documents = shows if shows is not None else not (is_cohere or self._is_bare)

    async def whole(self) -> bytes:
        """The answer's JSON."""
        scores, outputs = await self.scores()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        if self._request.top_n:
            order = order[: self._request.top_n]
        if self._is_bare:
            return orjson.dumps([self._bare(index, scores[index]) for index in order])
        results = [self._result(index, scores[index]) for index in order]
        answer = {
            "id": self.response_id,
            "model": self._model.name,
            "results": results,
            "usage": usage(outputs),
        }
        if self._is_cohere:
            answer["meta"] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return orjson.dumps(answer)

    def _result(self, index: int, score: float) -> dict[str, Any]:
        result: dict[str, Any] = {"index": index, "relevance_score": score}
        if self._shows_documents:
            result["document"] = {"text": self.pairs[index][1]}
        return result

    def _bare(self, index: int, score: float) -> dict[str, Any]:
        text = {"text": self.pairs[index][1]} if self._shows_documents else {}
        return {"index": index, "score": score, **text}


def check_num_inputs(count: int) -> None:
    """Refuse more inputs than a request may have, before its jobs are made."""
    if count > MAX_POOLED_PER_REQUEST:
        raise InvalidRequestError(
            f"the request has {count} inputs; at most {MAX_POOLED_PER_REQUEST} are allowed", "input"
        )


async def encoded(outputs: Sequence[PooledOutput], encoding: str) -> list[Any]:
    """Outputs as they stand in an answer's JSON."""
    if sum(len(output.data) for output in outputs) <= 4 * _NUMBERS_INLINE:
        return [_encoded(output, encoding) for output in outputs]
    return await asyncio.to_thread(lambda: [_encoded(output, encoding) for output in outputs])


def _encoded(output: PooledOutput, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(output.data).decode("ascii")
    # As float32: half the digits of the same number as a double.
    numbers = np.frombuffer(output.data, dtype=np.float32).reshape(output.shape)
    return orjson.Fragment(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY))


def _pooled(output: CompletionOutput) -> PooledOutput:
    assert output.pooled is not None
    return output.pooled


def _with(before: str, prompt: str | list[int] | TokenIds) -> str | list[int] | TokenIds:
    return before + prompt if before and isinstance(prompt, str) else prompt


def _text_of(document: str | dict[str, Any]) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError("a document must be a text, or an object with one in text", "documents")
    return text
