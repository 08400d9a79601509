"""/v1/completions: prompts to text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import override

from pagoda.errors import NotSupportedError
from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.serving.generation import check_cost, limit_time
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.call import Call, Choice, Part
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import CompletionLogprobs, joined, prompt_logprobs
from pagoda.serving.openai.requests import check_stream_options, generation_request
from pagoda.serving.openai.types import CompletionRequest
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.tokenizer import Tokenizer


class CompletionCall(Call):
    """Prompts to be completed."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, model: ServedModel, request: CompletionRequest, seconds: float | None) -> None:
        """Check everything that can be checked before a prompt is tokenized; `seconds` is the header's limit."""
        check_stream_options(request)
        # An echoed prompt has log-probabilities too.
        echoes_logprobs = bool(request.echo) and request.logprobs is not None
        overrides: dict[str, Any] = {"prompt_logprobs": request.logprobs} if echoes_logprobs else {}
        self._shows_prompt_only = bool(request.echo) and request.max_tokens == 0
        if self._shows_prompt_only:  # what is generated, for the engine does not do without, is not shown
            overrides |= {"max_tokens": 1, "min_tokens": None}
        job = limit_time(generation_request(request, model.generator.sampling_params, overrides), seconds)
        if request.stream and echoes_logprobs and job.params.n > 1:
            raise NotSupportedError("echo with logprobs and n > 1 cannot be streamed; leave stream out, or n")
        super().__init__(model, request)
        self._request = request
        add_special_tokens = request.add_special_tokens is not False
        check_cost(job.params, len(request.prompt))
        self._jobs = [replace(job, prompt=prompt, add_special_tokens=add_special_tokens) for prompt in request.prompt]
        self._echoed: list[str] = []

    @override
    async def jobs(self) -> list[GenerationRequest]:
        if self._request.echo:
            self._echoed = [await self._text_of(job) for job in self._jobs]
        return self._jobs

    @override
    def choice(self, index: int) -> Choice:
        prompt_index = index // self._jobs[0].params.n
        echoed = self._echoed[prompt_index] if self._request.echo else None
        tokenizer = self._model.generator.pool.tokenizer
        return _CompletionChoice(index, self._request, tokenizer, echoed)

    @override
    def shown(self, prompt_index: int, part: Part) -> Part:
        if not self._shows_prompt_only:
            return part
        text = self._echoed[prompt_index] if part.num_prompt_tokens is not None else ""
        texts: dict[str, Any] = {"text": text} if isinstance(part, GenerationChunk) else {"pieces": [text]}
        ends = None if part.finish_reason is None else FinishReason.LENGTH
        return replace(part, token_ids=[], logprobs=None, finish_reason=ends, stop_reason=None, **texts)

    async def _text_of(self, job: GenerationRequest) -> str:
        if isinstance(job.prompt, str):
            return job.prompt
        pool = self._model.generator.pool
        return await pool.decode(job.prompt, skip_special_tokens=job.params.skip_special_tokens)


class _CompletionChoice(Choice):
    def __init__(self, index: int, request: CompletionRequest, tokenizer: Tokenizer, echoed: str | None) -> None:
        super().__init__(index)
        self._request = request
        self._echoed = echoed
        self._logprobs = CompletionLogprobs(
            tokenizer,
            skip_special_tokens=request.skip_special_tokens is not False,
            as_token_ids=bool(request.return_tokens_as_token_ids),
        )

    @override
    async def whole(self, result: CompletionOutput) -> dict[str, Any]:
        return self._choice(result)

    @override
    async def deltas(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        choice = self._choice(chunk)
        shows = choice["text"] or choice["logprobs"] or choice["finish_reason"] or choice.get("token_ids")
        shows = shows or "prompt_logprobs" in choice
        return [choice] if shows else []

    @override
    def text_delta(self, text: str) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": None, **finish_fields(None, None)}

    def _choice(self, part: GenerationChunk | CompletionOutput) -> dict[str, Any]:
        """The choice that shows `part`, a chunk or a whole sequence."""
        choice: dict[str, Any] = {
            "index": self.index,
            "text": part.text,
            "logprobs": self._logprobs_of(part),
            **finish_fields(part.finish_reason, part.stop_reason),
        }
        if self._request.prompt_logprobs is not None and part.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(part.prompt_logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
            if part.prompt_token_ids is not None:
                choice["prompt_token_ids"] = part.prompt_token_ids
        return choice

    def _logprobs_of(self, part: GenerationChunk | CompletionOutput) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        parts = []
        prompt_token_ids = part.prompt_token_ids
        if self._echoed is not None and part.prompt_logprobs is not None and prompt_token_ids:
            parts.append(self._logprobs.add_prompt(prompt_token_ids, part.prompt_logprobs, self._echoed))
        if part.logprobs:
            parts.append(self._logprobs.add(part.logprobs, prompt_token_ids))
        return joined(parts) if parts else None
