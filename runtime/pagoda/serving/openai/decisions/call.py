"""A request of /v1/decisions, from checked to its answers."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from pagoda.errors import EngineNotReadyError, InvalidRequestError, shown
from pagoda.request import GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.serving.generation import limit_time, until
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.decisions.questions import Label, Question, json_as_text, questions_of
from pagoda.serving.openai.decisions.types import DecisionRequest
from pagoda.serving.openai.requests import parse_request, template_messages
from pagoda.serving.openai.responses.requests import messages_of, with_instructions
from pagoda.serving.openai.tools import reasoning_variables
from pagoda.serving.openai.types import ChatCompletionRequest
from pagoda.serving.parameters import parse_parameters
from pagoda.text.output import CompletionOutput

_MAX_CHARACTERS_AT_ONCE = 1 << 20
"""Of prompts that are held at a time: every question has the whole input before it."""
_OUTPUTS = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}


class DecisionCall:
    """One prompt a question: the input, then the question. What may answer it are single tokens, and their
    log-probabilities behind the prompt are the answer.
    """

    def __init__(self, model: ServedModel, body: DecisionRequest, seconds: float | None) -> None:
        self._model = model
        self._generator = model.generator
        self._questions = questions_of(body.questions)
        self._messages = _messages(body.input)
        self._shows_prompt = bool(body.return_prompt_token_ids)
        self._variables = {**reasoning_variables("none", None), **(body.chat_template_kwargs or {})}
        self._job = limit_time(
            parse_parameters(
                {
                    **{name: getattr(body, name) for name in ("priority", "cache_salt", "timeout_seconds")},
                    **{"max_tokens": 1, "temperature": 0.0, "num_speculative_tokens": 0},
                },
                lambda given: SamplingParams(**given),
            ),
            seconds,
        )
        self._num_characters = sum(len(str(message)) for message in self._messages)

    async def whole(self) -> bytes:
        """The answer's JSON."""
        deadline = self._model.runner.deadline(self._job)
        answers: list[dict[str, Any]] = []
        outputs: list[CompletionOutput] = []
        at_once = max(1, min(_MAX_CHARACTERS_AT_ONCE // self._num_characters, self._num_slots()))
        response_id = f"decision-{uuid.uuid4().hex}"
        start, count = 0, 1  # the first alone: the others find the input in the prefix cache
        while start < len(self._questions):
            part = self._questions[start : start + count]
            labels = [question.labels(self._generator.pool.tokenizer) for question in part]
            jobs = await asyncio.gather(*map(self._job_of, part, labels))
            found = await self._model.runner.collect_all(
                [until(job, deadline) for job in jobs],
                f"{response_id}-{start}",
                is_request=start == 0,
            )
            for question, own, (output,) in zip(part, labels, found, strict=True):
                answers.append(self._answer(question, own, output))
                outputs.append(output)
            start, count = start + len(part), at_once
        return orjson.dumps({"model": self._model.name, "answers": answers, "usage": _usage(outputs)})

    def _num_slots(self) -> int:
        ready = self._model.ready
        return ready.max_num_seqs if ready is not None else 1

    async def _job_of(self, question: Question, labels: Sequence[Label]) -> GenerationRequest:
        prompt = await self._generator.pool.render_chat_and_encode(
            _with_question(self._messages, question.text(labels)),
            add_generation_prompt=True,
            template_variables=self._variables,
        )
        if self._generator.answer_format is not None:
            prompt = prompt + self._generator.answer_format.skipping_reasoning(prompt)
        params = replace(self._job.params, logprob_token_ids=tuple(label.token_id for label in labels))
        return replace(self._job, prompt=prompt, params=params)

    def _answer(self, question: Question, labels: Sequence[Label], output: CompletionOutput) -> dict[str, Any]:
        if not output.logprobs:
            raise EngineNotReadyError("the server ended the request; send it again")
        logprobs = [token.logprob for token in output.logprobs[0].top]
        greatest = max(logprobs)
        weights = [math.exp(logprob - greatest) for logprob in logprobs]
        total = math.fsum(weights)
        answer = question.answer([weight / total for weight in weights])
        if self._shows_prompt:
            answer["prompt_token_ids"] = output.prompt_token_ids
            answer["label_token_ids"] = [label.token_id for label in labels]
        return answer


def _usage(outputs: Sequence[CompletionOutput]) -> dict[str, Any]:
    count = sum(output.num_prompt_tokens for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "input_tokens": count,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": count,
    }


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input in the chat template's form. Raises what /v1/responses raises for an input that it cannot read."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    calls: set[tuple[str, object]] = set()
    items = []
    for item in given:
        kind = item.get("type", "message")
        if kind not in ("message", *_OUTPUTS, *_OUTPUTS.values()):
            raise InvalidRequestError(
                f"input: an item must be a message, a call or its output, got type {shown(kind)}", "input"
            )
        if kind in _OUTPUTS.values():
            calls.add((kind, item.get("call_id")))
        elif kind in _OUTPUTS and (_OUTPUTS[kind], item.get("call_id")) not in calls:
            raise InvalidRequestError(f"input: a {kind} has no call before it with its call_id", "input")
        items.append({**item, "content": _with_json_as_text(item["content"])} if "content" in item else item)
    messages = with_instructions(messages_of(items), None)
    return template_messages(parse_request(ChatCompletionRequest, {"messages": messages}).messages)


def _with_json_as_text(content: object) -> object:
    if not isinstance(content, list):
        return content
    return [
        {"type": "input_text", "text": json_as_text(part, "input")}
        if isinstance(part, Mapping) and part.get("type") == "input_json"
        else part
        for part in content
    ]


def _with_question(messages: Sequence[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """With the question in the last message of the user: many chat templates take no two of them in a row."""
    *before, last = messages
    if last["role"] == "user" and isinstance(last.get("content"), str):
        return [*before, {**last, "content": f"{last['content']}\n\n{question}"}]
    return [*messages, {"role": "user", "content": question}]
