"""The routes of Text Generation Inference with Hugging Face's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError

from pagoda.errors import ErrorKind
from tests.support.rest_harness import RestHarness

PROMPT = "one two three four five"


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> InferenceClient:
    return InferenceClient(model=harness.url + "/")


@pytest.fixture(autouse=True)
def _no_script(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None
    harness.engine.fail_after = None
    harness.engine.max_requests = None


def answers(harness: RestHarness, text: str) -> None:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)


def test_the_client_completes_a_prompt(harness: RestHarness, client: InferenceClient) -> None:
    answers(harness, "塔 and more")
    assert client.text_generation(PROMPT, max_new_tokens=50) == "塔 and more"
    assert client.text_generation(PROMPT, max_new_tokens=50, return_full_text=True) == PROMPT + "塔 and more"


def test_details_name_every_token(harness: RestHarness, client: InferenceClient) -> None:
    answers(harness, "six seven")
    answer = client.text_generation(
        PROMPT, max_new_tokens=50, details=True, decoder_input_details=True, seed=3, top_n_tokens=2
    )
    assert answer.details is not None
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.seed == 3
    tokens = answer.details.tokens
    assert len(tokens) == answer.details.generated_tokens
    assert [token.special for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert "".join(token.text for token in tokens if not token.special) == answer.generated_text == "six seven"
    assert [token.id for token in answer.details.prefill] == harness.engine.submitted[-1].prompt_token_ids
    assert answer.details.prefill[0].logprob is None
    assert [len(top) for top in answer.details.top_tokens or []] == [2] * len(tokens)


def test_a_stream_says_what_the_whole_answer_says(harness: RestHarness, client: InferenceClient) -> None:
    answers(harness, "塔 and 🙂 more")
    whole = client.text_generation(PROMPT, max_new_tokens=50, details=True)
    parts = list(client.text_generation(PROMPT, max_new_tokens=50, details=True, stream=True))
    assert "".join(part.token.text for part in parts if not part.token.special) == whole.generated_text
    assert "".join(client.text_generation(PROMPT, max_new_tokens=50, stream=True)) == whole.generated_text
    assert [part.index for part in parts] == list(range(1, len(parts) + 1))
    assert whole.details is not None
    assert [part.token.id for part in parts] == [token.id for token in whole.details.tokens]
    assert [part.generated_text for part in parts] == [None] * (len(parts) - 1) + [whole.generated_text]
    end = parts[-1].details
    assert end is not None
    assert (end.finish_reason, end.generated_tokens) == ("eos_token", len(parts))
    assert end.input_length == len(harness.engine.submitted[-1].prompt_token_ids)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_each_route_by_itself(harness: RestHarness, path: str) -> None:
    answers(harness, "six")
    response = harness.client.post(path, json={"inputs": PROMPT, "parameters": {"max_new_tokens": 1}})
    assert response.status_code == 200
    if path == "/generate_stream":
        (data,) = [line for line in response.text.splitlines() if line]
        answer = json.loads(data.removeprefix("data:"))
        assert answer["details"]["finish_reason"] == "length"
    else:
        answer = response.json() if path == "/generate" else response.json()[0]
    assert answer["generated_text"] == harness.pool.tokenizer.decode((harness.engine.script or [])[:1])


def test_a_stop_string_is_part_of_the_text(harness: RestHarness, client: InferenceClient) -> None:
    answers(harness, "one two three four")
    answer = client.text_generation(PROMPT, max_new_tokens=50, stop=["three"], details=True)
    assert answer.generated_text == "one two three"
    assert answer.details is not None
    assert answer.details.finish_reason == "stop_sequence"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (0.0, 0, 1.0)),
        ({"temperature": 1.0}, (0.0, 0, 1.0)),
        ({"do_sample": True}, (1.0, 0, 1.0)),
        ({"temperature": 0.5}, (0.5, 0, 1.0)),
        ({"top_k": 5}, (1.0, 5, 1.0)),
        ({"top_p": 0.5}, (1.0, 0, 0.5)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 4}, (0.7, 4, 0.9)),
    ],
)
def test_sampling_is_as_tgi_has_it(
    harness: RestHarness, client: InferenceClient, parameters: Any, expected: tuple[float, int, float]
) -> None:
    client.text_generation(PROMPT, max_new_tokens=1, **parameters)
    params = harness.engine.submitted[-1].params
    assert (params.temperature, params.top_k, params.top_p) == expected


def test_penalties_and_grammars_reach_the_engine(harness: RestHarness, client: InferenceClient) -> None:
    answers(harness, "1234")
    client.text_generation(
        PROMPT,
        max_new_tokens=8,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        grammar={"type": "regex", "value": "[0-9]+"},  # type: ignore[arg-type]
    )
    params = harness.engine.submitted[-1].params
    assert (params.repetition_penalty, params.frequency_penalty) == (1.5, 0.5)
    assert params.structured_outputs is not None
    assert params.structured_outputs.kind == "regex"
    for kind, value in (("json", {"type": "object"}), ("json_schema", {"name": "x", "schema": {"type": "object"}})):
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1, "grammar": {"type": kind, "value": value}}}
        assert harness.client.post("/generate", json=body).status_code == 200
        assert harness.engine.submitted[-1].params.structured_outputs.kind == "json_schema"  # type: ignore[union-attr]


def test_truncate_keeps_the_end_of_the_prompt(harness: RestHarness, client: InferenceClient) -> None:
    client.text_generation(PROMPT, max_new_tokens=1, truncate=2)
    ids = harness.pool.tokenizer.encode(PROMPT)
    assert harness.engine.submitted[-1].prompt_token_ids == ids[-2:]
    longer = "one " * 70  # than the context holds
    assert len(harness.pool.tokenizer.encode(longer)) > 128
    client.text_generation(longer, max_new_tokens=1, truncate=5)
    assert len(harness.engine.submitted[-1].prompt_token_ids) == 5


def test_info_has_the_limits(harness: RestHarness) -> None:
    info = harness.client.get("/info").json()
    assert (info["max_total_tokens"], info["max_input_tokens"]) == (128, 127)
    assert info["model_pipeline_tag"] == "text-generation"
    assert info["model_device_type"] == "cpu"


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"truncate": 0}, "truncate"),
        ({"top_p": 3.0}, "top_p"),
        ({"grammar": {"type": "json_schema", "value": {}}}, "grammar"),
        ({"stop": "x"}, "parameters.stop"),
    ],
)
def test_what_is_wrong_is_a_validation_error(
    harness: RestHarness, client: InferenceClient, parameters: Any, named: str
) -> None:
    response = harness.client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["error_type"] == "validation"
    assert named in error["error"]
    with pytest.raises(ValidationError, match=named.rpartition(".")[2]):
        client.text_generation(PROMPT, **{"max_new_tokens": 4, **parameters})


def test_a_prompt_that_does_not_fit_is_a_validation_error(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="maximum context length"):
        client.text_generation("one " * 500, max_new_tokens=4)


def test_a_full_queue_and_a_failure_have_their_types(harness: RestHarness, client: InferenceClient) -> None:
    harness.engine.max_requests = 0
    with pytest.raises(OverloadedError):
        client.text_generation(PROMPT, max_new_tokens=4)
    harness.engine.max_requests = None
    harness.engine.fail_after = (2, ErrorKind.INTERNAL)
    with pytest.raises(GenerationError):
        list(client.text_generation(PROMPT, max_new_tokens=8, stream=True))
