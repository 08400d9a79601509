"""V2 over REST: metadata, infer with JSON and binary tensors, generate, the repository extension."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pagoda import __version__
from tests.support.rest_harness import RestHarness

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


def num_tokens(harness: RestHarness, text: str) -> int:
    return harness.client.post("/tokenize", json={"prompt": text}).json()["count"]


def infer(harness: RestHarness, path: str = "/v2/models/demo/infer", **body: Any) -> dict[str, Any]:
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def outputs_of(answer: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: output for output in answer["outputs"]}


def text_tensor(*texts: str, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": "text_input", "shape": shape or [len(texts)], "datatype": "BYTES", "data": list(texts)}


def events(harness: RestHarness, body: dict[str, Any]) -> list[dict[str, Any]]:
    with harness.client.stream("POST", "/v2/models/demo/generate_stream", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_server_metadata_names_version_and_extensions(harness: RestHarness, path: str) -> None:
    metadata = harness.client.get(path).json()
    assert metadata["name"] == "pagoda"
    assert metadata["version"] == __version__
    assert {"binary_tensor_data", "model_repository", "generate"} <= set(metadata["extensions"])


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_model_metadata_and_readiness_with_and_without_version(harness: RestHarness, version: str) -> None:
    metadata = harness.client.get(f"/v2/models/demo{version}").json()
    assert metadata["name"] == "demo"
    assert metadata["versions"] == ["1"]
    assert {"name": "text_input", "datatype": "BYTES", "shape": [-1]} in metadata["inputs"]
    ready = harness.client.get(f"/v2/models/demo{version}/ready")
    assert (ready.status_code, ready.json()) == (200, {"name": "demo", "ready": True})


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/demo/versions/2", "/v2/models/other/ready"])
def test_unknown_model_or_version_is_404(harness: RestHarness, path: str) -> None:
    answer = harness.client.get(path)
    assert answer.status_code == 404
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("path", ["/v2/models/demo/infer", "/v2/models/demo/versions/1/infer"])
def test_infer_answers_each_prompt(harness: RestHarness, path: str) -> None:
    counts = [num_tokens(harness, PROMPT), num_tokens(harness, "b")]
    answer = infer(harness, path, id="42", inputs=[text_tensor(PROMPT, "b")], parameters={"max_tokens": 2})
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("demo", "1", "42")
    outputs = outputs_of(answer)
    assert [output["name"] for output in answer["outputs"]] == [
        *("text_output", "output_ids", "finish_reason", "num_input_tokens", "num_output_tokens")
    ]
    assert outputs["text_output"]["shape"] == [2]
    assert PROMPT.startswith(outputs["text_output"]["data"][0])
    assert outputs["text_output"]["data"][1] == "bb"
    assert outputs["output_ids"]["shape"] == [2, 2]
    assert outputs["finish_reason"]["data"] == ["length", "length"]
    assert outputs["num_input_tokens"]["data"] == counts
    assert outputs["num_output_tokens"]["data"] == [2, 2]


def test_infer_generates_an_id_where_none_is_given(harness: RestHarness) -> None:
    first, second = (infer(harness, inputs=[text_tensor("a")], parameters={"max_tokens": 1}) for _ in range(2))
    assert first["id"]
    assert first["id"] != second["id"]


def test_infer_takes_a_column_of_prompts_nested_or_flat(harness: RestHarness) -> None:
    flat = infer(harness, inputs=[text_tensor("a", "b", shape=[2, 1])], parameters={"max_tokens": 1})
    nested = {**text_tensor("a", "b", shape=[2, 1]), "data": [["a"], ["b"]]}
    assert outputs_of(infer(harness, inputs=[nested], parameters={"max_tokens": 1})) == outputs_of(flat)


def test_infer_takes_token_ids_and_returns_them_unpadded_for_equal_lengths(harness: RestHarness) -> None:
    ids = {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [[10, 11, 12], [20, 21, 22]]}
    outputs = outputs_of(infer(harness, inputs=[ids], parameters={"max_tokens": 3}))
    assert outputs["output_ids"]["data"] == [10, 11, 12, 20, 21, 22]
    single = {"name": "input_ids", "shape": [2], "datatype": "INT32", "data": [10, 11]}
    assert outputs_of(infer(harness, inputs=[single], parameters={"max_tokens": 1}))["output_ids"]["data"] == [10]


def test_shorter_output_ids_are_padded(harness: RestHarness) -> None:
    limits = {"name": "max_tokens", "shape": [2], "datatype": "INT32", "data": [1, 3]}
    ids = {"name": "input_ids", "shape": [2, 1], "datatype": "INT64", "data": [10, 11]}
    outputs = outputs_of(infer(harness, inputs=[ids, limits]))
    assert outputs["output_ids"]["shape"] == [2, 3]
    assert outputs["output_ids"]["data"] == [10, -1, -1, 11, 11, 11]
    assert outputs["num_output_tokens"]["data"] == [1, 3]


def test_sampling_tensors_apply_to_all_prompts_or_to_each(harness: RestHarness) -> None:
    num_before = len(harness.engine.submitted)
    infer(
        harness,
        inputs=[
            text_tensor("a", "b"),
            {"name": "temperature", "shape": [2, 1], "datatype": "FP32", "data": [0.25, 0.5]},
            {"name": "top_k", "shape": [1], "datatype": "INT32", "data": [7]},
            {"name": "ignore_eos", "shape": [1], "datatype": "BOOL", "data": [True]},
            {"name": "stop", "shape": [2], "datatype": "BYTES", "data": ["x", "y"]},
            {"name": "stop_token_ids", "shape": [2, 1], "datatype": "INT64", "data": [[100], [101]]},
            {"name": "logit_bias", "shape": [1], "datatype": "BYTES", "data": ['{"5": 1.5}']},
        ],
        parameters={"max_tokens": 1, "seed": 3, "cache_salt": "tenant", "priority": -2},
    )
    first, second = sorted(harness.engine.submitted[num_before:], key=lambda request: request.params.temperature)
    assert (first.params.temperature, second.params.temperature) == (0.25, 0.5)
    assert (first.params.top_k, second.params.top_k) == (7, 7)
    assert first.params.stop == second.params.stop == ("x", "y")
    assert (first.params.stop_token_ids, second.params.stop_token_ids) == ((100,), (101,))
    assert first.params.logit_bias == {5: 1.5}
    assert first.params.ignore_eos
    assert (first.cache_keys, first.priority, first.params.seed) == (("salt=tenant",), -2, 3)


def test_several_sequences_a_prompt_are_a_second_dimension(harness: RestHarness) -> None:
    answer = infer(harness, inputs=[text_tensor("a", "b")], parameters={"max_tokens": 2, "n": 3})
    outputs = outputs_of(answer)
    assert outputs["text_output"]["shape"] == [2, 3]
    assert outputs["text_output"]["data"] == ["aa"] * 3 + ["bb"] * 3
    assert outputs["output_ids"]["shape"] == [2, 3, 2]
    assert outputs["num_output_tokens"]["shape"] == [2, 3]


def test_only_requested_outputs_come_back_in_the_order_asked(harness: RestHarness) -> None:
    answer = infer(
        harness,
        inputs=[text_tensor("a")],
        outputs=[{"name": "finish_reason"}, {"name": "text_output"}],
        parameters={"max_tokens": 1},
    )
    assert [output["name"] for output in answer["outputs"]] == ["finish_reason", "text_output"]


def test_logprobs_come_as_json_when_they_are_asked_for(harness: RestHarness) -> None:
    ids = {"name": "input_ids", "shape": [1], "datatype": "INT64", "data": [70]}
    outputs = outputs_of(infer(harness, inputs=[ids], parameters={"max_tokens": 2, "logprobs": 2}))
    entries = json.loads(outputs["logprobs"]["data"][0])
    assert [entry["id"] for entry in entries] == [70, 70]
    assert [candidate["id"] for candidate in entries[0]["top"]] == [70, 71]


def binary_body(*texts: str, ids: list[int] | None = None, **rest: Any) -> tuple[bytes, dict[str, str]]:
    if ids is None:
        raw = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
        tensor = {"name": "text_input", "shape": [len(texts)], "datatype": "BYTES"}
    else:
        raw = np.asarray(ids, dtype="<i8").tobytes()
        tensor = {"name": "input_ids", "shape": [1, len(ids)], "datatype": "INT64"}
    content = {"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}], **rest}
    head = json.dumps(content).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def test_binary_inputs_give_the_same_answer_as_json(harness: RestHarness) -> None:
    parameters = {"max_tokens": 4}
    body, headers = binary_body("grün", PROMPT, parameters=parameters)
    answer = harness.client.post("/v2/models/demo/infer", content=body, headers=headers).json()
    assert outputs_of(answer) == outputs_of(infer(harness, inputs=[text_tensor("grün", PROMPT)], parameters=parameters))


def test_each_output_comes_in_the_form_that_was_asked_for(harness: RestHarness) -> None:
    body, headers = binary_body(
        ids=[10, 11, 12],
        parameters={"max_tokens": 3, "binary_data_output": True},
        outputs=[{"name": "output_ids"}, {"name": "text_output", "parameters": {"binary_data": False}}],
    )
    answer = harness.client.post("/v2/models/demo/infer", content=body, headers=headers)
    assert answer.status_code == 200
    length = int(answer.headers["Inference-Header-Content-Length"])
    outputs = outputs_of(json.loads(answer.content[:length]))
    assert outputs["output_ids"]["parameters"]["binary_data_size"] == 24
    assert "data" not in outputs["output_ids"]
    assert len(outputs["text_output"]["data"]) == 1
    assert np.frombuffer(answer.content[length:], dtype="<i8").tolist() == [10, 11, 12]


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_packed_bodies_are_unpacked(harness: RestHarness, encoding: str, pack: Any) -> None:
    body = pack(json.dumps({"text_input": "a", "parameters": {"max_tokens": 1}}).encode())
    answer = harness.client.post("/v2/models/demo/generate", content=body, headers={"Content-Encoding": encoding})
    assert answer.json()["text_output"] == "a"


def test_generate_answers_one_prompt(harness: RestHarness) -> None:
    count = num_tokens(harness, PROMPT)
    body = {"id": "x", "text_input": PROMPT, "parameters": {"max_tokens": count, "temperature": 0}}
    assert harness.client.post("/v2/models/demo/generate", json=body).json() == {
        "id": "x",
        "model_name": "demo",
        "model_version": "1",
        "text_output": PROMPT,
        "finish_reason": "length",
        "num_input_tokens": count,
        "num_output_tokens": count,
    }


def test_generate_takes_parameters_beside_the_text_as_well(harness: RestHarness) -> None:
    inside = {"text_input": "a", "parameters": {"max_tokens": 3}}
    beside = {"text_input": "a", "max_tokens": 3}
    first, second = (
        harness.client.post("/v2/models/demo/versions/1/generate", json=b).json() for b in (inside, beside)
    )
    assert first == second
    assert first["text_output"] == "aaa"


def test_generate_details_hold_ids_and_logprobs(harness: RestHarness) -> None:
    body = {"input_ids": [70, 71], "parameters": {"max_tokens": 2, "details": True, "logprobs": 1}}
    details = harness.client.post("/v2/models/demo/generate", json=body).json()["details"]
    assert details["output_ids"] == [70, 71]
    assert [entry["id"] for entry in details["logprobs"]] == [70, 71]
    assert details["finish_reason"] == "length"


def test_generate_with_a_stop_string_says_why_it_stopped(harness: RestHarness) -> None:
    body = {"text_input": PROMPT, "parameters": {"stop": ["upon"], "details": True}}
    answer = harness.client.post("/v2/models/demo/generate", json=body).json()
    assert answer["text_output"] == "Once "
    assert answer["finish_reason"] == "stop"
    assert answer["details"]["stop_reason"] == "upon"


def test_generate_without_max_tokens_ends_at_the_models_limit(harness: RestHarness) -> None:
    answer = harness.client.post("/v2/models/demo/generate", json={"text_input": "a"}).json()
    assert answer["finish_reason"] == "length"
    assert answer["num_input_tokens"] + answer["num_output_tokens"] == 128


def test_streamed_pieces_join_to_the_whole_answer(harness: RestHarness) -> None:
    body = {"id": "s", "text_input": PROMPT + " grün 🙂", "parameters": {"max_tokens": 20, "details": True}}
    whole = harness.client.post("/v2/models/demo/generate", json=body).json()
    pieces = events(harness, body)
    assert len(pieces) > 2
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert all("finish_reason" not in piece for piece in pieces[:-1])
    assert {**pieces[-1], "text_output": whole["text_output"]} == whole


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_configuration_and_statistics_are_what_perf_analyzer_reads(harness: RestHarness, version: str) -> None:
    config = harness.client.get(f"/v2/models/demo{version}/config").json()
    assert (config["name"], config["max_batch_size"]) == ("demo", 0)
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert {"name": "text_input", "data_type": "TYPE_STRING", "dims": [-1], "optional": True} in config["input"]

    def success() -> dict[str, int]:
        (stats,) = harness.client.get(f"/v2/models/demo{version}/stats").json()["model_stats"]
        assert (stats["name"], stats["version"]) == ("demo", "1")
        assert harness.client.get("/v2/models/stats").json()["model_stats"] == [stats]
        counts: dict[str, int] = stats["inference_stats"]["success"]
        assert stats["inference_count"] == counts["count"]
        return counts

    before = success()
    for _ in range(3):
        harness.client.post("/v2/models/demo/generate", json={"text_input": "a", "max_tokens": 2})
    after = success()
    assert after["count"] == before["count"] + 3
    assert after["ns"] > before["ns"]
    for operation in ("config", "stats"):
        assert harness.client.get(f"/v2/models/other/{operation}").status_code == 404


TRITON_NAMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TensorRT-LLM": (
        {
            "max_tokens": 4,
            "bad_words": "",
            "stop_words": "",
            "pad_id": 2,
            "end_id": 2,
            "beam_width": 1,
            "random_seed": 7,
            "min_length": 1,
            "return_log_probs": False,
        },
        {"max_tokens": 4, "stop_token_ids": (2,), "seed": 7, "min_tokens": 1, "bad_words": (), "stop": ()},
    ),
    "stop words": ({"max_new_tokens": 3, "stop_words": ["x", "yz"]}, {"max_tokens": 3, "stop": ("x", "yz")}),
    "vLLM": (
        {"sampling_parameters": '{"temperature": 0.5, "max_tokens": 2}', "stream": False},
        {"temperature": 0.5, "max_tokens": 2},
    ),
    "log probs": ({"return_log_probs": True, "max_tokens": 1}, {"logprobs": 0}),
}


@pytest.mark.parametrize("case", TRITON_NAMES)
def test_generate_takes_the_names_of_tritons_llm_models(harness: RestHarness, case: str) -> None:
    given, expected = TRITON_NAMES[case]
    for body in ({"text_input": "a", **given}, {"text_input": "a", "parameters": given}):
        answer = harness.client.post("/v2/models/demo/generate", json=body)
        assert answer.status_code == 200, answer.text
        request = harness.engine.submitted[-1]
        found = {name: getattr(request.params, name) for name in expected} | {"max_tokens": request.max_tokens}
        assert found == {"max_tokens": request.max_tokens, **expected}
        assert ("details" in answer.json()) == (case == "log probs")


@pytest.mark.parametrize("shows_input", [True, False])
def test_generate_shows_the_input_where_it_is_not_excluded(harness: RestHarness, shows_input: bool) -> None:
    body = {"text_input": "ab", "max_tokens": 2, "exclude_input_in_output": not shows_input}
    answer = harness.client.post("/v2/models/demo/generate", json=body).json()
    assert answer["text_output"] == ("abab" if shows_input else "ab")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"beam_width": 4}, "no beam search"),
        ({"max_new_tokens": 3, "max_tokens": 4}, "given twice"),
        ({"sampling_parameters": "{"}, "sampling_parameters must be a JSON object"),
        ({"return_log_probs": 1}, "return_log_probs must be true or false"),
        ({"random_seeds": 1}, "unknown parameter"),
    ],
)
def test_what_generate_cannot_do_under_tritons_names_is_said(
    harness: RestHarness, given: dict[str, Any], words: str
) -> None:
    answer = harness.client.post("/v2/models/demo/generate", json={"text_input": "a", **given})
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_repository_knows_the_one_model(harness: RestHarness) -> None:
    index = harness.client.post("/v2/repository/index", json={}).json()
    assert index == [{"name": "demo", "version": "1", "state": "READY", "reason": ""}]
    load = harness.client.post("/v2/repository/models/demo/load", json={})
    assert (load.status_code, load.json()) == (200, {"name": "demo", "load": True})
    assert harness.client.post("/v2/repository/models/demo/unload").status_code == 400
    assert harness.client.post("/v2/repository/models/other/load").status_code == 404
    assert harness.client.post("/v2/repository/models/other/unload").status_code == 404


def test_kserves_own_routes_are_not_there(harness: RestHarness) -> None:
    assert harness.client.post("/v1/models/demo:predict", json={"instances": []}).status_code == 405
    assert harness.client.get("/v2/models").status_code == 404


def test_the_request_id_of_the_client_comes_back_if_it_is_well_formed(harness: RestHarness) -> None:
    answer = harness.client.get("/v2", headers={"X-Request-Id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    answer = harness.client.get("/v2", headers={"X-Request-Id": "a b"})
    assert answer.headers["x-request-id"] not in ("", "a b")


def test_openapi_page_describes_every_route_and_resolves_every_reference(harness: RestHarness) -> None:
    document = harness.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"InferenceRequest", "GenerateRequest", "CompletionRequest", "ChatCompletionRequest", "V2Error"} <= set(
        schemas
    )

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    assert {reference.removeprefix("#/components/schemas/") for reference in references(document)} <= set(schemas)
    schemes = document["components"]["securitySchemes"]
    assert document["security"] == [{name: []} for name in schemes]
    assert [(scheme["type"], scheme.get("scheme") or scheme["in"]) for scheme in schemes.values()] == [
        ("http", "bearer"),
        ("apiKey", "header"),
    ]
    open_to_all = {path for path, routes in document["paths"].items() if routes.get("get", {}).get("security") == []}
    assert {"/health", "/v2/health/ready", "/v2/models/{model_name}/ready"} <= open_to_all
    assert not open_to_all & {"/metrics", "/v1/models", "/v2/models/{model_name}", "/api/version"}
    statuses = {
        status for path in document["paths"].values() for route in path.values() for status in route["responses"]
    }
    assert "422" not in statuses
    assert "/v2/models/{model_name}/versions/{model_version}/infer" in document["paths"]
