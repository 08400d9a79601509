"""/v1/decisions with OpenAI's own client: probabilities are those that transformers gives for the same prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.serving.openai.decisions.types import DecisionResponse
from tests.support.server import ServerProcess

DEMO_MODEL = demo_checkpoint()
INPUT = "I was charged twice for the same order. " * 6
PREDICATE = {"type": "predicate", "name": "urgent", "instructions": "The customer wants an answer today."}
CHOICE = {
    "type": "choice",
    "instructions": "Which team should answer?",
    "choices": [{"value": "billing"}, {"value": True, "description": "whoever"}, {"value": "true"}],
}
SCORE = {
    "type": "score",
    "name": "mood",
    "instructions": [{"type": "input_text", "text": "How is the mood in"}, {"type": "input_json", "data": {"a": [1]}}],
    "levels": [{"label": "calm"}, {"label": "annoyed", "description": "a bit"}, {"label": "furious"}],
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(model=DEMO_MODEL, dtype="float32", max_num_seqs=4) as running:
        running.wait_until_ready()
        yield running


def decide(server: ServerProcess, *questions: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/decisions", json={"input": INPUT, "questions": questions, **body})
    assert answer.status_code == 200, answer.text
    DecisionResponse.model_validate(answer.json())
    return answer.json()


def refused(server: ServerProcess, **body: Any) -> str:
    answer = server.client.post("/v1/decisions", json=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 600
    return answer.json()["error"]["message"]


def test_probabilities_are_those_of_transformers(server: ServerProcess) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = decide(server, PREDICATE, CHOICE, SCORE, return_prompt_token_ids=True)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    for answer, labels in zip(answers, (["Yes", "No"], ["A", "B", "C"], ["A", "B", "C"]), strict=True):
        prompt, ids = answer["prompt_token_ids"], answer["label_token_ids"]
        if answer["type"] != "predicate" or len(tokenizer.encode("Yes", add_special_tokens=False)) == 1:
            assert [tokenizer.decode(id) for id in ids] == labels
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].double()
        expected = logits[ids].softmax(0).tolist()
        if answer["type"] == "predicate":
            found = [answer["probability"], 1 - answer["probability"]]
        else:
            found = [each["probability"] for each in answer["probabilities"]]
            assert sum(found) == pytest.approx(1)
            assert answer["confidence"] == pytest.approx((max(expected) - 1 / 3) / (2 / 3), abs=1e-4)
        assert found == pytest.approx(expected, abs=1e-5)
    _, choice, score = answers
    best = max(choice["probabilities"], key=lambda each: each["probability"])
    assert choice["choice"] == best["value"]
    assert [type(each["value"]) for each in choice["probabilities"]] == [str, bool, str]
    assert [(each["value"], each["label"]) for each in score["probabilities"]] == [
        *((0, "calm"), (1, "annoyed"), (2, "furious"))
    ]
    assert score["score"] == pytest.approx(sum(each["value"] * each["probability"] for each in score["probabilities"]))


def test_a_question_is_read_behind_the_input_in_the_users_message(server: ServerProcess) -> None:
    ids = decide(server, CHOICE, return_prompt_token_ids=True)["answers"][0]["prompt_token_ids"]
    text = server.client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert (
        text.index(INPUT)
        < text.index("Which team should answer?")
        < text.index("A. billing\nB. true: whoever\nC. true")
    )


def test_openais_client_reads_the_answers_in_order(server: ServerProcess) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be strict."}]},
        {
            "role": "user",
            "content": [{"type": "input_json", "data": {"order": 7}}, {"type": "input_text", "text": "hi"}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "charged twice"},
    ]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        questions: list[Any] = [SCORE, PREDICATE, CHOICE] * 4
        answer = client.decisions.create(model="demo", input=messages, questions=questions, prompt_cache_key="k")
    assert [each.type for each in answer.answers] == ["score", "predicate", "choice"] * 4
    assert [each.name for each in answer.answers[:3]] == ["mood", "urgent", None]
    assert answer.answers[0] == answer.answers[9]  # alone and among others
    assert answer.usage.output_tokens == 0
    assert answer.usage.total_tokens == answer.usage.input_tokens > 0


def test_the_input_is_computed_once_for_all_questions(server: ServerProcess) -> None:
    usage = decide(server, *[PREDICATE, CHOICE, SCORE] * 2, input=f"once {INPUT * 3}")["usage"]
    num_questions, share = 6, usage["input_tokens"] / 6
    assert usage["input_tokens_details"]["cached_tokens"] > 0.6 * share * (num_questions - 1)


def test_as_many_options_as_the_vocabulary_has_tokens_for(server: ServerProcess) -> None:
    choices = [{"value": f"{index}"} for index in range(255)]
    words = refused(server, input="a", questions=[{**CHOICE, "choices": choices}])
    found = re.search(r"255 options.* (\d+) only", words)
    assert found
    most = int(found[1])
    assert most >= 60
    question = {**CHOICE, "choices": choices[:most]}
    answer = decide(server, question, return_prompt_token_ids=True, input="a")["answers"][0]
    assert len(set(answer["label_token_ids"])) == len(answer["probabilities"]) == most
    assert sum(each["probability"] for each in answer["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"questions": []}, "a list of questions"),
        ({"questions": [PREDICATE] * 401}, "at most 400"),
        ({"questions": [{"type": "box"}]}, "predicate, choice, score"),
        ({"questions": [{**PREDICATE, "instructions": ""}]}, "instructions"),
        ({"questions": [{**PREDICATE, "instructions": [{"type": "input_image", "image_url": "data:,"}]}]}, "only text"),
        ({"questions": [{**PREDICATE, "name": 3}]}, "name must be a string"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "2 to 255"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "the same value"),
        ({"questions": [PREDICATE, {**CHOICE, "choices": [{"value": "a"}, {"value": 1}]}]}, "questions[1]"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}, {"label": True}]}]}, "label"),
        ({"input": ""}, "not an empty one"),
        ({"input": []}, "not an empty one"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        ({"input": [{"role": "user", "content": [{"type": "input_json", "data": 3}]}]}, "an object or a list"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "no call before it"),
        ({"input": [{"type": "reasoning", "content": []}]}, "type"),
        ({"input": "a " * 4000}, "tokens"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(server: ServerProcess, change: dict[str, Any], words: str) -> None:
    assert words in refused(server, **{"input": "a", "questions": [PREDICATE], **change})


def test_deeply_nested_json_is_refused(server: ServerProcess) -> None:
    data: Any = {}
    for _ in range(40):
        data = {"a": data}
    question = {**PREDICATE, "instructions": [{"type": "input_json", "data": data}]}
    assert "nested" in refused(server, input="a", questions=[question])
