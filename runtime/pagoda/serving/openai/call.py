"""A generating request of OpenAI's routes, from checked to its response: whole, or in server-sent events.

Chat and completions differ in their jobs and in what a choice looks like (`Choice`); everything around the choices is here.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from contextlib import aclosing
from typing import Any, ClassVar, TypeVar

from pagoda.request import GenerationRequest
from pagoda.serving.http.event_stream import DONE, Events, EventTemplate, event
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.types import SamplingFields
from pagoda.serving.openai.usage import UsageCounter
from pagoda.text.output import CompletionOutput, GenerationChunk

Part = TypeVar("Part", GenerationChunk, CompletionOutput)


class Choice(ABC):
    """One choice of a response, with what it must remember between the chunks of a stream."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.has_begun = False  # a chunk of it came

    def opening(self) -> dict[str, Any] | None:
        """The choice of its first event, before anything is known of it; None where there is none."""
        return None

    @abstractmethod
    async def whole(self, result: CompletionOutput) -> dict[str, Any]:
        """The choice of a finished sequence."""

    @abstractmethod
    async def deltas(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The choices of the events that `chunk` becomes, none if there is nothing to show."""

    @abstractmethod
    def text_delta(self, text: str) -> dict[str, Any]:
        """`deltas` of a chunk, not the first, that has only text."""


class Call(ABC):
    """A checked request; `whole` or `events` runs it, once. `response_id`: of the response, and of the request in logs."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]

    def __init__(self, model: ServedModel, request: SamplingFields) -> None:
        self._model = model
        self.response_id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        options = request.stream_options
        self._includes_usage = bool(options and options.include_usage)
        self._returns_ids = bool(request.return_token_ids)
        self._is_usage_continuous = bool(self._includes_usage and options and options.continuous_usage_stats)

    @abstractmethod
    async def jobs(self) -> list[GenerationRequest]:
        """One job a prompt, all with the same number of sequences."""

    @abstractmethod
    def choice(self, index: int) -> Choice:
        """The choice of that number, before its first chunk; choices are numbered through all prompts."""

    def shown(self, prompt_index: int, part: Part) -> Part:
        """What of a chunk, or of a whole sequence, is shown and counted."""
        return part

    def members_of(self, results: list[list[CompletionOutput]]) -> dict[str, Any]:
        """What a whole response has beside its choices and usage; `results[prompt][sequence]`."""
        return {}

    def members_of_chunk(self, chunk: GenerationChunk) -> dict[str, Any]:
        """What the first event of `chunk` has beside its choices and usage."""
        return {}

    async def whole(self) -> dict[str, Any]:
        """The response when everything is done; cancelling the call aborts it in the engine."""
        jobs = await self.jobs()
        results = await self._model.runner.collect_all(jobs, self.response_id)
        usage = UsageCounter(has_drafts=self._model.config.speculative_config is not None)
        choices: list[dict[str, Any]] = []
        for prompt_index, sequences in enumerate(results):
            for sequence in sequences:
                result = self.shown(prompt_index, sequence)
                # The engine computes them for the first sequence of a prompt only; they are the same for all.
                result.prompt_logprobs = sequences[0].prompt_logprobs
                usage.add(prompt_index, result)
                choices.append(await self.choice(len(choices)).whole(result))
        return {**self.envelope(self.object_name, choices), "usage": usage.usage(), **self.members_of(results)}

    async def events(self) -> Events:
        """The response in events; closing the iterator aborts it in the engine."""
        jobs = await self.jobs()
        usage = UsageCounter(has_drafts=self._model.config.speculative_config is not None)
        choices: dict[int, tuple[Choice, EventTemplate]] = {}
        async with aclosing(self._model.runner.stream_all(jobs, self.response_id)) as chunks:
            async for prompt_index, made in chunks:
                chunk = self.shown(prompt_index, made)
                usage.add(prompt_index, chunk)
                members = self.members_of_chunk(chunk)
                if not choices:  # OpenAI's helper numbers choices as they begin, so all begin in their order
                    for index in range(sum(job.params.n for job in jobs)):
                        begun = self.choice(index)
                        choices[index] = begun, self._text_template(begun)
                        if (opening := begun.opening()) is not None:
                            yield event({**self._chunk([opening], self._usage_so_far(usage)), **members})
                            members = {}
                choice, text_event = choices[prompt_index * jobs[prompt_index].params.n + chunk.index]
                if (
                    choice.has_begun
                    and chunk.finish_reason is None
                    and not (chunk.logprobs or chunk.deltas or self._is_usage_continuous or self._returns_ids)
                ):
                    if chunk.text:
                        yield text_event(chunk.text)
                    continue
                choice.has_begun = True
                for delta in await choice.deltas(chunk):
                    yield event({**self._chunk([delta], self._usage_so_far(usage)), **members})
                    members = {}
        if self._includes_usage:
            yield event(self._chunk([], usage.usage()))
        yield DONE

    def envelope(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The members that a response and all its events share, around `choices`."""
        return {
            "id": self.response_id,
            "object": object_name,
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        content = self.envelope(self.chunk_object_name, choices)
        return {**content, "usage": usage} if self._includes_usage else content

    def _usage_so_far(self, usage: UsageCounter) -> dict[str, Any] | None:
        return usage.usage() if self._is_usage_continuous else None

    def _text_template(self, choice: Choice) -> EventTemplate:
        return EventTemplate(lambda text: self._chunk([choice.text_delta(text)], None))
