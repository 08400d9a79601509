"""/v1/completions, with OpenAI's own client: streams equal whole answers, every field has its effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pagoda.serving.openai.types import CompletionResponse
from tests.support.rest_harness import RestHarness

PROMPT = "Once upon a time grün 🙂"


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


@pytest.fixture(scope="module", params=["/v1", "/openai/v1"])
def client(harness: RestHarness, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=harness.url + request.param, api_key="none", max_retries=0) as made:
        yield made


def joined_stream(client: openai.OpenAI, **arguments: Any) -> tuple[dict[int, dict[str, Any]], Any]:
    """Text, finish reason and logprobs of each choice, joined from the pieces; and the usage of the last event."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in client.completions.create(stream=True, **arguments):
        usage = event.usage or usage
        for piece in event.choices:
            choice = choices.setdefault(piece.index, {"text": "", "finish_reason": None, "logprobs": None})
            assert choice["finish_reason"] is None, "a piece came after the last"
            choice["text"] += piece.text
            choice["finish_reason"] = piece.finish_reason
            if piece.logprobs is not None:
                lists = piece.logprobs.model_dump()
                before = choice["logprobs"] or {name: [] for name in lists}
                choice["logprobs"] = {name: before[name] + lists[name] for name in lists}
    return choices, usage


def test_the_answer_has_openais_shape(harness: RestHarness) -> None:
    answer = harness.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).json()
    typed = CompletionResponse.model_validate(answer, strict=True)
    assert typed.id.startswith("cmpl-")
    assert typed.model == "demo"
    assert (typed.choices[0].text, typed.choices[0].finish_reason) == ("aaa", "length")
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPT, "max_tokens": 30},
        {"prompt": [PROMPT, "b", "see"], "max_tokens": 12},
        {"prompt": [[70, 71], [72]], "max_tokens": 5, "n": 2},
        {"prompt": [70, 71, 72], "max_tokens": 7, "logprobs": 3},
        {"prompt": PROMPT, "max_tokens": 20, "logprobs": 0},
        {"prompt": PROMPT, "max_tokens": 20, "echo": True},
        {"prompt": PROMPT, "max_tokens": 20, "echo": True, "logprobs": 2},
        {"prompt": PROMPT, "max_tokens": 60, "stop": ["time"]},
        {"prompt": "a", "max_tokens": 4, "n": 3},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    whole = client.completions.create(model="demo", **arguments)
    choices, usage = joined_stream(client, model="demo", stream_options={"include_usage": True}, **arguments)
    assert sorted(choices) == [choice.index for choice in whole.choices]
    for choice in whole.choices:
        pieces = choices[choice.index]
        assert pieces["text"] == choice.text
        assert pieces["finish_reason"] == choice.finish_reason
        assert pieces["logprobs"] == (choice.logprobs.model_dump() if choice.logprobs else None)
    assert usage == whole.usage


def test_prompts_are_answered_in_order_and_choices_numbered_through(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], n=2, max_tokens=1)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)


def test_echo_puts_the_prompt_before_the_completion(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5)
    echoed = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text


@pytest.mark.parametrize("prompt", [PROMPT, [70, 71, 72]])
@pytest.mark.parametrize("n", [1, 2])
def test_echo_without_a_completion_shows_the_prompt_alone(client: openai.OpenAI, prompt: Any, n: int) -> None:
    arguments: dict[str, Any] = {"model": "demo", "prompt": prompt, "echo": True, "n": n}
    more = client.completions.create(**arguments, max_tokens=3, logprobs=1)
    answer = client.completions.create(**arguments, max_tokens=0, logprobs=1)
    choices, usage = joined_stream(client, **arguments, max_tokens=0, stream_options={"include_usage": True})
    assert more.usage is not None
    for whole, choice in zip(more.choices, answer.choices, strict=True):
        assert whole.text.startswith(choice.text)
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert whole.logprobs is not None
        assert whole.logprobs.tokens is not None
        assert whole.logprobs.tokens[:-3] == choice.logprobs.tokens
        assert len(choice.logprobs.tokens) == more.usage.prompt_tokens
        assert choices[choice.index] == {"text": choice.text, "finish_reason": "length", "logprobs": None}
    assert usage == answer.usage
    assert usage.completion_tokens == 0


def test_tokens_may_go_by_their_ids_in_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo",
        prompt=[70, 71],
        max_tokens=2,
        logprobs=1,
        echo=True,
        extra_body={"return_tokens_as_token_ids": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["token_id:70", "token_id:71", "token_id:70", "token_id:71"]
    assert logprobs.top_logprobs is not None
    assert all(name.startswith("token_id:") for top in logprobs.top_logprobs[1:] for name in top)


def test_logprobs_have_one_entry_a_token_and_offsets_into_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=30, logprobs=2)
    text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.token_logprobs or []) == 30
    assert logprobs.text_offset[0] == 0
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\ufffd" not in token:  # a token that is a whole piece of text stands where its offset says
            assert text[offset : offset + len(token)] == token
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs)


def test_a_character_left_half_counts_in_the_offsets_behind_it(harness: RestHarness, client: openai.OpenAI) -> None:
    half = harness.client.post("/tokenize", json={"prompt": "🙂"}).json()["tokens"][0]
    letter = harness.client.post("/tokenize", json={"prompt": "a"}).json()["tokens"][0]
    answer = client.completions.create(model="demo", prompt=[half, letter], max_tokens=4, logprobs=0)
    assert answer.choices[0].text == "\ufffda\ufffda"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3]


def test_usage_counts_what_a_prompt_found_in_the_prefix_cache_once(harness: RestHarness, client: openai.OpenAI) -> None:
    harness.engine.num_cached_tokens = 2
    try:
        answer = client.completions.create(model="demo", prompt=[[70, 71, 72], [73, 74, 75]], max_tokens=1, n=2)
    finally:
        harness.engine.num_cached_tokens = 0
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_echoed_logprobs_cover_the_prompt_and_its_first_token_has_none(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=[70, 71, 72], max_tokens=2, logprobs=1, echo=True, n=2)
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.text == "".join(choice.logprobs.tokens or [])


def test_prompt_logprobs_come_in_vllms_shape(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=[70, 71], max_tokens=1, extra_body={"prompt_logprobs": 1}
    ).model_dump()
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["71"]["rank"] == 1
    assert second["71"]["logprob"] == -0.5


def test_streamed_prompt_logprobs_come_though_the_first_token_is_half_a_character(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo", prompt="🙂", max_tokens=8, stream=True, extra_body={"prompt_logprobs": 1}
    )
    found = [choice.model_extra for event in stream for choice in event.choices if choice.model_extra]
    assert [extra["prompt_logprobs"][0] for extra in found if "prompt_logprobs" in extra] == [None]


def test_sampling_fields_reach_the_engine(harness: RestHarness, client: openai.OpenAI) -> None:
    client.completions.create(
        model="demo",
        prompt="a",
        max_tokens=2,
        temperature=0.25,
        top_p=0.5,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -10},
        stop="x",
        user="somebody",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 1,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "priority": 3,
            "cache_salt": "salt",
            "allowed_token_ids": [66],
            "a_field_of_the_future": 1,
        },
    )
    request = harness.engine.submitted[-1]
    sampling = request.params
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == {5: -10}
    assert sampling.stop == ("x",)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (4, 0.1, 1.5, 1)
    assert sampling.ignore_eos
    assert sampling.stop_token_ids == (9,)
    assert sampling.allowed_token_ids == (66,)
    assert (request.priority, request.cache_keys, request.max_tokens) == (3, ("salt=salt",), 2)


def test_a_whole_number_may_be_written_as_a_float(harness: RestHarness) -> None:
    body = {"max_tokens": 3.0, "n": 2.0, "top_k": 4.0, "seed": 7.0, "logprobs": 1.0, "priority": 1e1}
    answer = harness.client.post("/v1/completions", json={"prompt": "a", **body})
    assert answer.json()["usage"]["completion_tokens"] == 6
    request = harness.engine.submitted[-1]
    assert (request.params.top_k, request.priority, request.max_tokens) == (4, 10, 3)
    generated = harness.client.post("/v2/models/demo/generate", json={"text_input": "a", "max_tokens": 2.0})
    assert generated.json()["num_output_tokens"] == 2


def test_without_max_tokens_the_models_limit_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="a")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 128


def test_the_stop_string_is_named_as_the_reason(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="demo", prompt=PROMPT, stop=["time"]).choices[0]
    assert (choice.finish_reason, choice.text) == ("stop", "Once upon a ")
    assert choice.model_dump()["stop_reason"] == "time"


def test_usage_comes_with_every_event_if_asked_for(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    events = client.completions.create(model="demo", prompt="a", max_tokens=3, stream=True, stream_options=options)
    counts = [event.usage.completion_tokens for event in events if event.usage]
    assert counts == [1, 2, 3, 3]


def test_usage_is_left_out_of_a_stream_unless_asked_for(client: openai.OpenAI) -> None:
    events = list(client.completions.create(model="demo", prompt="a", max_tokens=3, stream=True))
    assert all(event.usage is None and event.choices for event in events)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    card = client.models.retrieve("demo")
    assert card.owned_by == "pagoda"
    assert card.model_dump()["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": "a", "temperature": -1}, openai.BadRequestError),
        ({"prompt": "a", "model": "other"}, openai.NotFoundError),
        ({"prompt": "a", "extra_headers": {"X-Request-Timeout-Seconds": "0.001"}}, openai.APIStatusError),
    ],
)
def test_the_sdk_understands_our_errors(
    client: openai.OpenAI, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "demo", **arguments})
    assert getattr(caught.value, "message", "")


def test_tokenize_and_detokenize_are_each_others_inverse(harness: RestHarness) -> None:
    tokens = harness.client.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 128
    assert harness.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
