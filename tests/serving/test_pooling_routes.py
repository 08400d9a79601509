"""Embeddings, scores, reranking and classes over every route, from real servers with small encoders."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.serving.pooling.types import (
    ClassifyResponse,
    EmbeddingResponse,
    PoolingResponse,
    RerankResponse,
    ScoreResponse,
)
from tests.support.encoders import VOCAB_SIZE, save_bert
from tests.support.server import ServerProcess

CLIENTS = Path(__file__).parents[1] / "support" / "clients"
POOLING_METRICS = {
    "request_prompt_tokens_count": 2,
    "request_prompt_tokens_sum": 5 + 3,
    "request_success_total": 2,
    "e2e_request_latency_seconds_count": 2,
    "request_inference_time_seconds_count": 2,
    "request_queue_time_seconds_count": 2,
    "time_to_first_token_seconds_count": 0,
}
TEXTS = ["the cat sat on the mat", "berlin is the capital of germany", "war and peace", "a"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("embedder")
    save_bert(directory)
    with ServerProcess(model=directory, max_num_seqs=8) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("scorer")
    save_bert(directory, num_labels=1)
    with ServerProcess(model=directory, model_name="scorer") as running:
        running.wait_until_ready()
        yield running


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(server: ServerProcess, texts: Any, **body: Any) -> np.ndarray[Any, Any]:
    answer = post(server, "/v1/embeddings", input=texts, **body)
    EmbeddingResponse.model_validate(answer)
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)


def test_openais_client_gets_the_vectors_that_it_asks_for_in_base64(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="demo", input=TEXTS)
        short = client.embeddings.create(model="demo", input=TEXTS[0], dimensions=8)
    floats = vectors(server, TEXTS)
    np.testing.assert_array_equal(np.array([one.embedding for one in answer.data], dtype=np.float32), floats)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text.split()) + 2 for text in TEXTS)
    np.testing.assert_allclose(
        np.array(short.data[0].embedding), floats[0, :8] / np.linalg.norm(floats[0, :8]), rtol=1e-5
    )


def test_texts_and_ids_alone_and_together_give_the_same(server: ServerProcess) -> None:
    together = vectors(server, TEXTS)
    for index, text in enumerate(TEXTS):
        np.testing.assert_array_equal(vectors(server, text)[0], together[index])
    ids = post(server, "/tokenize", prompt=TEXTS[1])["tokens"]
    np.testing.assert_array_equal(vectors(server, ids)[0], together[1])
    np.testing.assert_array_equal(vectors(server, [ids, ids])[1], together[1])
    np.testing.assert_array_equal(vectors(server, TEXTS * 20)[76], together[0])  # more than the engine has slots
    encoded = post(server, "/openai/v1/embeddings", input=TEXTS, encoding_format="base64")["data"]
    raw = [np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in encoded]
    np.testing.assert_array_equal(np.array(raw), together)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "a " * 200}, "truncate_prompt_tokens"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "at least one id"),
        ({"input": [VOCAB_SIZE]}, "ids of this model"),
        ({"input": "a", "dimensions": 65}, "from 1 to 64"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "prompt_name": "query"}, "no prompt of this model"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": ["a"] * 2049}, "2048"),
        ({}, "input"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(server: ServerProcess, body: dict[str, Any], words: str) -> None:
    answer = server.client.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert len(answer.text) < 600


def test_long_texts_are_cut_where_the_request_says_so(server: ServerProcess) -> None:
    answer = post(server, "/v1/embeddings", input="cat " * 40000, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == 160


def test_what_the_model_does_not_do_is_400_and_says_what_it_does(server: ServerProcess) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v2/models/demo/generate", {"text_input": "hi"}),
        ("/classify", {"input": "hi"}),
    ):
        answer = server.client.post(path, json=body)
        assert answer.status_code in (400, 501), path
        assert "embed" in answer.text


def test_a_model_that_generates_says_how_to_get_vectors(tmp_path: Path) -> None:
    from tests.support.rest_harness import RestHarness

    with RestHarness() as harness:
        answer = harness.client.post("/v1/embeddings", json={"input": "hi"})
    assert answer.status_code in (400, 501)
    assert "--task embed" in answer.json()["error"]["message"]


def test_scores_of_vectors_are_their_cosines(server: ServerProcess) -> None:
    found = vectors(server, TEXTS)
    units = found / np.linalg.norm(found, axis=1, keepdims=True)
    answer = post(server, "/score", text_1=TEXTS[0], text_2=TEXTS[1:])
    ScoreResponse.model_validate(answer)
    np.testing.assert_allclose([one["score"] for one in answer["data"]], units[1:] @ units[0], atol=1e-5)
    paired = post(server, "/v1/score", queries=TEXTS[:2], documents=TEXTS[2:])
    np.testing.assert_allclose([one["score"] for one in paired["data"]], (units[:2] * units[2:]).sum(1), atol=1e-5)
    assert server.client.post("/score", json={"text_1": TEXTS, "text_2": TEXTS[:2]}).status_code == 400


def test_pooling_gives_a_vector_for_each_token(server: ServerProcess) -> None:
    answer = post(server, "/pooling", input="the cat", task="token_embed")
    PoolingResponse.model_validate(answer)
    assert np.array(answer["data"][0]["data"]).shape == (4, 64)
    whole = post(server, "/v1/pooling", input="the cat")["data"][0]["data"]
    np.testing.assert_array_equal(np.array(whole, dtype=np.float32), vectors(server, "the cat")[0])


def test_reranking_in_each_of_its_shapes(scorer: ServerProcess) -> None:
    documents = TEXTS[:3]
    scores = [one["score"] for one in post(scorer, "/score", text_1="capital", text_2=documents)["data"]]
    order = sorted(range(3), key=lambda index: -scores[index])
    jina = post(scorer, "/v1/rerank", query="capital", documents=[documents[0], {"text": documents[1]}, documents[2]])
    RerankResponse.model_validate(jina)
    assert [one["index"] for one in jina["results"]] == order
    assert [one["relevance_score"] for one in jina["results"]] == [scores[index] for index in order]
    assert [one["document"]["text"] for one in jina["results"]] == [documents[index] for index in order]
    cohere = post(scorer, "/v2/rerank", query="capital", documents=documents, top_n=2)
    assert cohere["results"] == [{"index": index, "relevance_score": scores[index]} for index in order[:2]]
    assert cohere["meta"]["api_version"]["version"] == "2"
    bare = post(scorer, "/rerank", query="capital", texts=documents)
    assert bare == [{"index": index, "score": scores[index]} for index in order]
    for body in ({"query": "a"}, {"query": "a", "documents": []}, {"query": "a", "documents": [{"title": "b"}]}):
        assert scorer.client.post("/rerank", json=body).status_code == 400


def test_classes(scorer: ServerProcess) -> None:
    answer = post(scorer, "/classify", input=TEXTS)
    ClassifyResponse.model_validate(answer)
    assert all(one["label"] == "LABEL_0" and 0 < one["probs"][0] < 1 for one in answer["data"])
    logits = post(scorer, "/v1/classify", input=TEXTS, use_activation=False)
    for one, raw in zip(answer["data"], logits["data"], strict=True):
        assert one["probs"][0] == pytest.approx(1 / (1 + np.exp(-raw["probs"][0])), rel=1e-5)


def test_metrics_count_the_tokens_of_prompts(server: ServerProcess) -> None:
    def figures() -> dict[str, float]:
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(server.client.get("/metrics").text)
            for sample in family.samples
            if not sample.labels.keys() - {"model_name"} or sample.labels.get("finished_reason") == "stop"
        }

    before = figures()
    post(server, "/v1/embeddings", input=["the cat sat", "war"])
    after = figures()
    for prefix in ("pagoda_", "vllm:"):
        counted = {name: after[prefix + name] - before[prefix + name] for name in POOLING_METRICS}
        assert counted == POOLING_METRICS
        latencies = [
            after[f"{prefix}{name}_seconds_sum"] - before[f"{prefix}{name}_seconds_sum"]
            for name in ("e2e_request_latency", "request_inference_time")
        ]
        assert latencies[0] >= latencies[1] > 0


def test_the_routes_are_described(server: ServerProcess) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {
        "/v1/embeddings",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/classify",
        "/pooling",
    } <= set(paths)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_clients_get_float32_tensors(server: ServerProcess, protocol: str) -> None:
    port = server.port if protocol == "http" else server.grpc_port
    # In a process of its own: two sets of stubs of the package `inference` cannot be in one.
    command = [sys.executable, str(CLIENTS / "triton_embedding.py"), protocol, f"127.0.0.1:{port}", "demo", *TEXTS[:2]]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    np.testing.assert_array_equal(np.array(report["embedding"], dtype=np.float32), vectors(server, TEXTS[:2]))
    assert report["dtype"] == "float32"
    assert report["num_input_tokens"] == [8, 8]
    assert "embedding" in report["error"]


def test_pairs_over_v2_are_scored(scorer: ServerProcess) -> None:
    inputs = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [TEXTS[0]]},
        {"name": "text_pair", "datatype": "BYTES", "shape": [1], "data": [TEXTS[1]]},
    ]
    outputs = {one["name"]: one["data"] for one in post(scorer, "/v2/models/scorer/infer", inputs=inputs)["outputs"]}
    expected = post(scorer, "/score", text_1=TEXTS[0], text_2=TEXTS[1])["data"][0]["score"]
    assert outputs["score"] == [pytest.approx(expected)]
    metadata = scorer.client.get("/v2/models/scorer").json()
    assert [one["name"] for one in metadata["outputs"]] == ["score", "num_input_tokens"]
    wrong = scorer.client.post("/v2/models/scorer/infer", json={"inputs": inputs, "parameters": {"temperature": 1}})
    assert wrong.status_code == 400
    assert "temperature" in wrong.text
