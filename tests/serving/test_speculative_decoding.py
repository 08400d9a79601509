"""Speculative decoding as clients of OpenAI's routes see it: the same text, sooner, with counts of drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.cli.main import main
from tests.support.checkpoints import shared_checkpoint
from tests.support.server import ServerProcess

TOKENS = 60
GREEDY = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "user", "content": "Once upon a time there was a mill"}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 7})
    with ServerProcess(speculative_config=config) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **fields: Any) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="demo", messages=MESSAGES, **(GREEDY | fields))


def details_of(answer: openai.types.chat.ChatCompletion) -> tuple[int, int]:
    usage = answer.usage
    assert usage is not None
    details = usage.completion_tokens_details
    assert details is not None
    return details.accepted_prediction_tokens or 0, details.rejected_prediction_tokens or 0


def test_prediction_that_is_right_is_accepted_and_one_that_is_not_changes_nothing(client: openai.OpenAI) -> None:
    plain = chat(client, extra_body={"ignore_eos": True, "num_speculative_tokens": 0})
    assert details_of(plain) == (0, 0)
    text = plain.choices[0].message.content
    assert text
    for prediction in (
        {"type": "content", "content": text},
        {"type": "content", "content": [{"type": "text", "text": text}]},
    ):
        helped = chat(client, prediction=prediction)
        assert helped.choices[0].message.content == text
        # How many drafts are verified is up to what steps cost on this machine.
        assert 0 <= details_of(helped)[0] < TOKENS
    wrong = chat(client, prediction={"type": "content", "content": "0123456789 " * 20})
    assert wrong.choices[0].message.content == text
    assert wrong.usage.completion_tokens == plain.usage.completion_tokens == TOKENS


def test_stream_of_several_tokens_an_event_joins_to_the_same_text(client: openai.OpenAI) -> None:
    whole = chat(client)
    events = list(
        chat(
            client,
            stream=True,
            stream_options={"include_usage": True},
            prediction={"type": "content", "content": whole.choices[0].message.content},
        )
    )
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage.completion_tokens == TOKENS
    assert events[-1].usage.completion_tokens_details.accepted_prediction_tokens >= 0


def test_stop_string_among_accepted_drafts_ends_the_answer_where_it_does_without(client: openai.OpenAI) -> None:
    text = chat(client).choices[0].message.content
    assert text is not None
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    plain = chat(client, stop=stop, extra_body={"ignore_eos": True, "num_speculative_tokens": 0})
    helped = chat(client, stop=stop, prediction={"type": "content", "content": text})
    assert helped.choices == plain.choices
    assert helped.usage.completion_tokens == plain.usage.completion_tokens


def test_wrong_fields_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="num_speculative_tokens must be at least 0, got -1"):
        chat(client, extra_body={"num_speculative_tokens": -1})
    with pytest.raises(openai.BadRequestError, match="prediction"):
        chat(client, prediction={"type": "image", "content": ""})


def test_metrics_count_drafts_as_vllm_names_them(server: ServerProcess, client: openai.OpenAI) -> None:
    chat(client, prediction={"type": "content", "content": chat(client).choices[0].message.content})
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    found = {sample.name: sample.value for sample in samples}
    prefix = "pagoda_spec_decode_num_"
    assert 0 <= found[f"{prefix}drafts_total"] <= found[f"{prefix}draft_tokens_total"]
    per_position = {
        sample.labels["position"]: sample.value
        for sample in samples
        if sample.name == f"{prefix}accepted_tokens_per_pos_total"
    }
    assert list(per_position) == [str(position) for position in range(7)]
    assert sum(per_position.values()) == found[f"{prefix}accepted_tokens_total"]


def test_bench_serve_shows_the_acceptance_length(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    address = f"http://127.0.0.1:{server.port}"
    fixed = ["--num-prompts", "4", "--input-len", "40", "--output-len", "80", "--max-concurrency", "1"]
    assert main(["bench", "serve", "--base-url", address, *fixed, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["results"]["speculative_decoding"]
    assert figures["num_draft_tokens"] >= figures["num_accepted_tokens"] == sum(figures["accepted_per_position"])
    if figures["num_drafts"]:  # as many as pay on this machine
        assert 1 <= figures["acceptance_length"] <= 8


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_endless_answers_to_64_clients_with_a_full_kv_cache_end_in_their_caps_and_leave_it_free(method: str) -> None:
    """What took the server down that this one is made after: nothing ends these answers but their lengths."""
    model = shared_checkpoint()
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 6}
    config |= {"model": str(model)} if method == "draft_model" else {"prompt_lookup_min": 1, "prompt_lookup_max": 8}
    settings = {"max_model_len": 128, "num_gpu_blocks_override": 41, "max_num_seqs": 32, "max_num_waiting": 64}
    with ServerProcess(speculative_config=json.dumps(config), model=model, kv_cache_watermark=0, **settings) as server:
        server.wait_until_ready()

        def ask(number: int) -> dict[str, Any]:
            body = {
                "model": "demo",
                "prompt": [11, 12, 13, 14] * (1 + number % 9),
                "temperature": 0,
                "ignore_eos": True,
                "logit_bias": {str(11 + number % 4): 30},
                **({"max_tokens": 20 + number} if number % 3 else {"max_tokens": 128 - 4 * (1 + number % 9)}),
            }
            answer = server.client.post("/v1/completions", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            return {"asked": body["max_tokens"], **answer.json()}

        with ThreadPoolExecutor(64) as clients:
            answers = list(clients.map(ask, range(64)))
        for answer in answers:
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == answer["asked"]
        metrics = server.client.get("/metrics").text
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if not sample.labels.get("position")
        }
        assert found["pagoda_num_preemptions_total"] > 0
        assert found["pagoda_kv_cache_usage_perc"] == 0  # all blocks are free, those that are cached among them
        assert found["pagoda_num_requests_running"] == found["pagoda_num_requests_waiting"] == 0
        assert "leak" not in server.log
