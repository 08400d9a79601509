"""A request of /generate or /generate_stream, from checked to its completion: whole, or an event for each token."""

from __future__ import annotations

import uuid
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pagoda.errors import NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.serving.http.event_stream import Events, event
from pagoda.serving.json_values import finite_logprob
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.completions import CompletionCall
from pagoda.serving.tgi.requests import completion_request
from pagoda.serving.tgi.types import TgiParameters, TgiRequest
from pagoda.text.output import CompletionOutput, GenerationChunk, PositionLogprobs, TokenLogprob


class TgiCall:
    """A checked request; `whole` or `events` runs it, once."""

    def __init__(self, model: ServedModel, request: TgiRequest, seconds: float | None, *, streams: bool) -> None:
        """Check everything that can be checked before the prompt is tokenized; `seconds` is the header's limit."""
        self._parameters = request.parameters or TgiParameters()
        if streams and self._parameters.decoder_input_details:
            raise NotSupportedError("decoder_input_details cannot be streamed", "decoder_input_details")
        self._model = model
        self._inputs = request.inputs
        self._call = CompletionCall(model, completion_request(request), seconds)
        self._special_token_ids = model.generator.pool.tokenizer.special_token_ids

    async def whole(self) -> dict[str, Any]:
        """The completion when it is done; cancelling the call aborts it in the engine."""
        (result,) = await self._model.runner.collect(await self._job(), self._request_id())
        parameters = self._parameters
        response: dict[str, Any] = {"generated_text": self._full_text(result)}
        if parameters.details or parameters.decoder_input_details:
            positions = result.logprobs or []
            response["details"] = {
                **self._details(result),
                "prefill": self._prefill(result),
                "tokens": [self._token(position, position.chosen.token) for position in positions],
            }
            if parameters.top_n_tokens:
                response["details"]["top_tokens"] = [self._top(position) for position in positions]
        return response

    async def events(self) -> Events:
        """The completion in events; closing the iterator aborts it in the engine."""
        result = CompletionOutput()
        index = 0
        async with aclosing(self._model.runner.stream(await self._job(), self._request_id())) as chunks:
            async for chunk in chunks:
                result.add(chunk)
                made = self._tokens(chunk)
                for position, token in enumerate(made, start=1):
                    index += 1
                    is_end = chunk.finish_reason is not None and position == len(made)
                    ends = {
                        "generated_text": self._full_text(result) if is_end else None,
                        "details": {**self._details(result), "input_length": result.num_prompt_tokens}
                        if is_end
                        else None,
                    }
                    yield event({"index": index, **token, **ends})

    def _request_id(self) -> str:
        return f"tgi-{uuid.uuid4().hex}"

    async def _job(self) -> GenerationRequest:
        (job,) = await self._call.jobs()
        if self._parameters.truncate is not None:
            ids = await self._model.generator.pool.encode(self._inputs)
            job = replace(job, prompt=ids[-self._parameters.truncate :])
        return job

    def _tokens(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The tokens of a chunk. Its text is settled with its last one, so that texts joined are the completion."""
        positions = chunk.logprobs or []
        tokens: list[dict[str, Any]] = [{"token": self._token(position, "")} for position in positions]
        if not tokens and (chunk.text or chunk.finish_reason is not None):
            # Text that was held back, behind the last token.
            tokens.append({"token": {"id": 0, "text": "", "logprob": 0.0, "special": not chunk.text}})
        for made, position in zip(tokens, positions, strict=False):
            if self._parameters.top_n_tokens:
                made["top_tokens"] = self._top(position)
        if tokens and chunk.text:
            tokens[-1]["token"] |= {"text": chunk.text, "special": False}
        return tokens

    def _full_text(self, result: CompletionOutput) -> str:
        return self._inputs + result.text if self._parameters.return_full_text else result.text

    def _details(self, result: CompletionOutput) -> dict[str, Any]:
        reason = "length"
        if result.finish_reason is FinishReason.STOP:
            reason = "stop_sequence" if isinstance(result.stop_reason, str) else "eos_token"
        return {
            "finish_reason": reason,
            "generated_tokens": len(result.token_ids),
            "seed": self._parameters.seed,
        }

    def _prefill(self, result: CompletionOutput) -> list[dict[str, Any]]:
        if not self._parameters.decoder_input_details:
            return []
        tokenizer = self._model.generator.pool.tokenizer
        logprobs = result.prompt_logprobs or [None] * len(result.prompt_token_ids)
        return [
            {
                "id": token_id,
                "text": tokenizer.token_bytes(token_id).decode(errors="replace"),
                "logprob": None if position is None else finite_logprob(position.chosen.logprob),
            }
            for token_id, position in zip(result.prompt_token_ids, logprobs, strict=True)
        ]

    def _token(self, position: PositionLogprobs, text: str) -> dict[str, Any]:
        return {**self._described(position.chosen), "text": text}

    def _top(self, position: PositionLogprobs) -> list[dict[str, Any]]:
        return [self._described(token) for token in position.top]

    def _described(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            "id": token.token_id,
            "text": token.token,
            "logprob": finite_logprob(token.logprob),
            "special": token.token_id in self._special_token_ids,
        }
