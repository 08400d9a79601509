"""/v1/chat/completions, with OpenAI's own clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from pagoda.sampling.output import FinishReason
from pagoda.serving.openai.finish import finish_fields
from pagoda.serving.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from pagoda.serving.openai.types import ChatCompletionResponse
from pagoda.serving.v2.inference import logprobs_json
from pagoda.text.output import PositionLogprobs, TokenLogprob
from pagoda.text.tokenizer import Tokenizer
from tests.support.rest_harness import RestHarness
from tests.support.tokenizers import save_tokenizer

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "grün 🙂?"}]


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=harness.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def chat_tokens(harness: RestHarness, **arguments: Any) -> list[int]:
    return harness.client.post("/tokenize", json={"messages": MESSAGES, **arguments}).json()["tokens"]


def test_the_answer_has_openais_shape(harness: RestHarness) -> None:
    answer = harness.client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3}).json()
    typed = ChatCompletionResponse.model_validate(answer, strict=True)
    assert typed.id.startswith("chatcmpl-")
    assert typed.choices[0].message.role == "assistant"
    assert typed.usage.prompt_tokens == len(chat_tokens(harness))
    assert typed.usage.completion_tokens == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 40},
        {"max_completion_tokens": 10, "n": 3},
        {"max_tokens": 20, "logprobs": True, "top_logprobs": 3},
        {"max_tokens": 40, "stop": ["brief"]},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, **arguments)
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    logprobs: dict[int, list[Any]] = {}
    usage = None
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **arguments
    )
    for event in stream:
        usage = event.usage or usage
        for piece in event.choices:
            if piece.index not in texts:
                assert piece.delta.role == "assistant"
            texts[piece.index] = texts.get(piece.index, "") + (piece.delta.content or "")
            reasons[piece.index] = piece.finish_reason
            if piece.logprobs is not None:
                logprobs.setdefault(piece.index, []).extend(piece.logprobs.content or [])
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert logprobs.get(choice.index) == (choice.logprobs.content if choice.logprobs else None)
    assert sorted(texts) == [choice.index for choice in whole.choices]
    assert usage == whole.usage


def test_logprobs_join_to_the_bytes_of_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=40,
        logprobs=True,
        top_logprobs=2,
        extra_body={"skip_special_tokens": False, "ignore_eos": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert len(entries) == 40
    joined = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert joined.decode("utf-8", "replace") == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_token_ids_come_with_their_text(harness: RestHarness) -> None:
    chat = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    whole = harness.client.post("/v1/chat/completions", json=chat).json()
    assert whole["prompt_token_ids"] == chat_tokens(harness)
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == whole["usage"]["completion_tokens"] == 12
    body = harness.client.post("/v1/chat/completions", json={**chat, "stream": True}).text
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [chat_tokens(harness)]
    assert [token for event in events for token in event["choices"][0].get("token_ids", ())] == ids
    prompts = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "temperature": 0, "return_token_ids": True, "n": 2}
    choices = harness.client.post("/v1/completions", json=prompts).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[5, 6, 7]] * 2 + [[8, 9]] * 2
    body = harness.client.post("/v1/completions", json={**prompts, "stream": True}).text
    streamed: dict[int, list[int]] = {}
    for line in body.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert streamed == {choice["index"]: choice["token_ids"] for choice in choices}


def test_max_completion_tokens_wins_over_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=9, max_completion_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_the_prompt_is_the_rendered_conversation(harness: RestHarness, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1)
    assert harness.engine.submitted[-1].prompt_token_ids == chat_tokens(harness)


def test_a_message_can_be_continued(harness: RestHarness, client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    client.chat.completions.create(
        model="demo", messages=messages, max_tokens=1, extra_body={"continue_final_message": True}
    )
    prompt = harness.engine.submitted[-1].prompt_token_ids
    assert harness.client.post("/detokenize", json={"tokens": prompt}).json()["prompt"].endswith("Well")


PARTS: dict[str, tuple[str, Any]] = {
    "text": ("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]),
    "of Responses": ("user", [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]),
    "an answer of Responses": ("assistant", [{"type": "output_text", "text": "one\ntwo"}]),
    "a refusal": ("assistant", [{"type": "refusal", "refusal": "one\ntwo"}]),
    "thinking": ("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "one\ntwo"}]),
    "plain strings": ("user", ["one", "two"]),
}


@pytest.mark.parametrize("case", PARTS)
def test_text_may_come_in_parts(harness: RestHarness, client: openai.OpenAI, case: str) -> None:
    role, content = PARTS[case]
    prompts = []
    for given in (content, "one\ntwo"):
        messages: Any = [{"role": role, "content": given}, {"role": "user", "content": "so?"}]
        client.chat.completions.create(model="demo", messages=messages, max_tokens=1)
        prompts.append(harness.engine.submitted[-1].prompt_token_ids)
    assert prompts[0] == prompts[1]


def test_what_has_no_effect_here_is_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=1,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        user="somebody",
        store=False,
        metadata={"a": "b"},
        parallel_tool_calls=True,
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_template_that_refuses_the_messages_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=[], max_tokens=1)


def test_tools_are_refused_where_the_models_format_is_not_known(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])
    assert caught.value.status_code == 400
    assert "--tool-call-parser" in caught.value.message


def test_without_max_tokens_the_models_limit_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 128


async def test_the_asynchronous_client_streams(harness: RestHarness) -> None:
    async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=9)
        stream = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=9, stream=True)
        text = "".join([event.choices[0].delta.content or "" async for event in stream])
    assert text == whole.choices[0].message.content


def test_a_token_that_cannot_come_has_a_logprob_that_json_can_hold(tmp_path: Path) -> None:
    impossible = TokenLogprob(token_id=5, token="x", bytes=[120], logprob=float("-inf"), rank=9)
    position = PositionLogprobs(chosen=impossible, top=[impossible])
    tokenizer = Tokenizer.from_directory(save_tokenizer(tmp_path, "byte_level_bpe"))
    of_completion = CompletionLogprobs(tokenizer, skip_special_tokens=True, as_token_ids=False).add([position])
    shapes = [chat_logprobs([position]), prompt_logprobs([position]), of_completion]
    for shape in [*shapes, logprobs_json([position])]:
        assert json.loads(orjson.dumps(shape)) == shape
        assert "-9999.0" in json.dumps(shape)


@pytest.mark.parametrize(
    ("reason", "stop_reason", "expected"),
    [
        (None, None, (None, None)),
        (FinishReason.STOP, "END", ("stop", "END")),
        (FinishReason.LENGTH, None, ("length", None)),
        (FinishReason.REPETITION, None, ("length", "repetition")),
    ],
)
def test_every_reason_has_a_word_that_openais_clients_know(reason: Any, stop_reason: Any, expected: Any) -> None:
    assert finish_fields(reason, stop_reason) == dict(zip(("finish_reason", "stop_reason"), expected, strict=True))
