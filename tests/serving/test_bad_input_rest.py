"""Every mistake of a client is answered with the right 4xx and a sentence, and the next good request is served."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

INFER = "/v2/models/demo/infer"
GENERATE = "/v2/models/demo/generate"
STREAM = "/v2/models/demo/generate_stream"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_BODY = 64 * 1024


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(max_body_bytes=MAX_BODY, max_header_bytes=8192) as running:
        yield running


@pytest.fixture(autouse=True)
def is_served_afterwards(harness: RestHarness) -> Iterator[None]:
    yield
    answer = harness.client.post(GENERATE, json={"text_input": "a", "max_tokens": 2})
    assert (answer.status_code, answer.json()["text_output"]) == (200, "aa")
    wait_until(lambda: harness.engine.num_running == 0)


def message_of(answer: Any) -> str:
    """The error's sentence, from the one shape that the route may use."""
    error = answer.json()["error"]
    if isinstance(error, dict):
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]
    return error


def tensor(name: str = "text_input", datatype: Any = "BYTES", shape: Any = (1,), data: Any = ("a",)) -> dict[str, Any]:
    shape, data = (list(value) if isinstance(value, tuple) else value for value in (shape, data))
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(*inputs: Any, **rest: Any) -> tuple[str, Any]:
    return INFER, {"inputs": list(inputs), **rest}


TEXT = tensor()
MESSAGES = [{"role": "user", "content": "hi"}]
# (path, body as JSON, a piece of the sentence)
BAD_JSON_VALUES: dict[str, tuple[str, Any, str]] = {
    "infer: no inputs": (INFER, {}, "inputs must be a list"),
    "infer: inputs not a list": (INFER, {"inputs": {}}, "inputs must be a list"),
    "infer: input not an object": (INFER, {"inputs": [1]}, "inputs must be a list of objects"),
    "infer: no input at all": (*infer(), "text_input"),
    "infer: unknown input": (*infer(TEXT, tensor("prompt")), "unknown input 'prompt'"),
    "infer: the same input twice": (*infer(TEXT, TEXT), "twice"),
    "infer: both inputs": (*infer(TEXT, tensor("input_ids", "INT64", (1,), (1,))), "not both"),
    "infer: name is no string": (*infer(tensor(7)), "name"),  # type: ignore[arg-type]
    "infer: unknown datatype": (*infer(tensor(datatype="STRING")), "datatype must be one of"),
    "infer: datatype is no string": (*infer(tensor(datatype=3)), "datatype must be a string"),
    "infer: text as numbers": (*infer(tensor(datatype="INT64", data=(1,))), "must be BYTES"),
    "infer: number in BYTES": (*infer(tensor(data=(1,))), "must be a string"),
    "infer: shape is no list": (*infer(tensor(shape="1")), "shape must be a list"),
    "infer: shape of strings": (*infer(tensor(shape=("1",))), "shape must hold integers"),
    "infer: negative shape": (*infer(tensor(shape=(-1,))), "shape must hold integers"),
    "infer: fractional shape": (*infer(tensor(shape=(1.5,))), "shape must hold integers"),
    "infer: huge shape": (*infer(tensor(shape=(2**62, 2**62))), "shape must hold integers"),
    "infer: shape overflows": (*infer(tensor(shape=(2**30, 2**30, 2**30))), "elements"),
    "infer: too many dimensions": (*infer(tensor(shape=(1,) * 9)), "dimensions"),
    "infer: scalar shape": (*infer(tensor(shape=())), "must have shape [n] or [n, 1]"),
    "infer: empty batch": (*infer(tensor(shape=(0,), data=())), "at least 1"),
    "infer: two columns": (*infer(tensor(shape=(1, 2), data=("a", "b"))), "must have shape [n] or [n, 1]"),
    "infer: fewer elements than the shape": (*infer(tensor(shape=(2,))), "needs 2 elements, got 1"),
    "infer: nested otherwise than the shape": (*infer(tensor(shape=(2, 1), data=(["a", "b"],))), "nested"),
    "infer: nested too deep": (*infer(tensor(shape=(1,), data=([["a"]],))), "nested"),
    "infer: data is an object": (*infer(tensor(data={})), "data must be a list"),
    "infer: no data": (*infer({"name": "text_input", "datatype": "BYTES", "shape": [1]}), "neither data"),
    "infer: empty prompt": (*infer(tensor(data=("",))), "empty"),
    "infer: ids as floats": (*infer(tensor("input_ids", "FP32", (1,), (1.0,))), "must be INT64"),
    "infer: fractional id": (*infer(tensor("input_ids", "INT64", (1,), (1.5,))), "INT64 element"),
    "infer: boolean id": (*infer(tensor("input_ids", "INT64", (1,), (True,))), "INT64 element"),
    "infer: negative id": (*infer(tensor("input_ids", "INT64", (1,), (-3,))), "token id"),
    "infer: id beyond the vocabulary": (*infer(tensor("input_ids", "INT64", (1,), (512,))), "512"),
    "infer: id beyond 64 bits": (*infer(tensor("input_ids", "INT64", (1,), (2**70,))), "INT64 element"),
    "infer: id that does not fit its datatype": (*infer(tensor("input_ids", "UINT8", (1,), (256,))), "UINT8 element"),
    "infer: ids of three dimensions": (*infer(tensor("input_ids", "INT64", (1, 1, 1), (1,))), "[t] or [n, t]"),
    "infer: prompt longer than the context": (
        *infer(tensor("input_ids", "INT64", (128,), (1,) * 128)),
        "context",
    ),
    "infer: a parameter for three of two prompts": (
        *infer(tensor(shape=(2,), data=("a", "b")), tensor("max_tokens", "INT32", (3,), (1, 2, 3))),
        "max_tokens must have shape [1] or [2]",
    ),
    "infer: list tensor of wrong shape": (
        *infer(TEXT, tensor("stop", "BYTES", (2, 1), ("a", "b"))),
        "stop must have shape",
    ),
    "infer: tensor and parameter": (
        *infer(TEXT, tensor("top_k", "INT32", (1,), (1,)), parameters={"top_k": 1}),
        "both as a tensor and as a parameter",
    ),
    "infer: n differs between prompts": (
        *infer(tensor(shape=(2,), data=("a", "b")), tensor("n", "INT32", (2,), (1, 2))),
        "n must be the same",
    ),
    "infer: more sequences than allowed": (
        *infer(tensor(shape=(9,), data=("a",) * 9), parameters={"n": 64}),
        "sequences",
    ),
    "infer: unknown parameter": (*infer(TEXT, parameters={"max_token": 3}), "unknown parameter 'max_token'"),
    "infer: parameters not an object": (*infer(TEXT, parameters=[1]), "parameters must be an object"),
    "infer: stream": (*infer(TEXT, parameters={"stream": True}), "generate_stream"),
    "infer: prompt_logprobs": (*infer(TEXT, parameters={"prompt_logprobs": 1}), "prompt_logprobs"),
    "infer: unknown output": (*infer(TEXT, outputs=[{"name": "text"}]), "the outputs are text_output"),
    "infer: output twice": (*infer(TEXT, outputs=[{"name": "text_output"}] * 2), "twice"),
    "infer: output without a name": (*infer(TEXT, outputs=[{}]), "name of an output"),
    "infer: outputs not a list": (*infer(TEXT, outputs="text_output"), "outputs must be a list"),
    "infer: binary_data is no boolean": (
        *infer(TEXT, outputs=[{"name": "text_output", "parameters": {"binary_data": 1}}]),
        "binary_data must be true or false",
    ),
    "infer: binary_data_output is no boolean": (
        *infer(TEXT, parameters={"binary_data_output": "yes"}),
        "true or false",
    ),
    "infer: id is no string": (*infer(TEXT, id=42), "id must be a string"),
    "infer: data and binary data": (*infer({**TEXT, "parameters": {"binary_data_size": 0}}), "both data and"),
    "infer: binary data that is not there": (
        *infer({"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 9}}),
        "0 bytes are left",
    ),
    "infer: negative binary size": (
        *infer({"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": -1}}),
        "binary_data_size must be an integer",
    ),
    "generate: no prompt": (GENERATE, {}, "text_input (BYTES) or input_ids (INT64) is required"),
    "generate: both prompts": (GENERATE, {"text_input": "a", "input_ids": [1]}, "not both"),
    "generate: prompt is a number": (GENERATE, {"text_input": 3}, "must be a string, got 3"),
    "generate: several prompts": (GENERATE, {"text_input": ["a"]}, "text_input must be one string here, got a list"),
    "generate: prompt is an object": (GENERATE, {"text_input": {"a": 1}}, "must be a string, got a dict"),
    "generate: id is no string": (GENERATE, {"text_input": "a", "id": 3}, "id must be a string"),
    "generate: ids are no list": (GENERATE, {"input_ids": 3}, "must be a list"),
    "generate: no ids": (GENERATE, {"input_ids": []}, "at least 1"),
    "generate: ids are strings": (GENERATE, {"input_ids": ["a"]}, "INT64 element"),
    "generate: nested ids": (GENERATE, {"input_ids": [[1]]}, "not nested as shape"),
    "generate: huge id": (GENERATE, {"input_ids": [2**40]}, "token ids"),
    "generate: empty prompt": (GENERATE, {"text_input": ""}, "empty"),
    "generate: stream": (GENERATE, {"text_input": "a", "stream": True}, "generate_stream"),
    "generate: several sequences": (GENERATE, {"text_input": "a", "n": 2}, "n must be 1"),
    "generate: parameters not an object": (GENERATE, {"text_input": "a", "parameters": "x"}, "must be an object"),
    "generate: a parameter twice": (GENERATE, {"text_input": "a", "n": 1, "parameters": {"n": 1}}, "both"),
    "generate: zero tokens": (GENERATE, {"text_input": "a", "max_tokens": 0}, "max_tokens must be"),
    "generate: negative tokens": (GENERATE, {"text_input": "a", "max_tokens": -5}, "max_tokens must be"),
    "generate: fractional tokens": (GENERATE, {"text_input": "a", "max_tokens": 2.5}, "max_tokens must be an integer"),
    "generate: tokens as a string": (GENERATE, {"text_input": "a", "max_tokens": "5"}, "max_tokens must be an integer"),
    "generate: tokens as a boolean": (GENERATE, {"text_input": "a", "max_tokens": True}, "max_tokens must be"),
    "generate: more tokens than the context": (GENERATE, {"text_input": "a", "max_tokens": 10**6}, "max_tokens"),
    "generate: more tokens than 64 bits": (GENERATE, {"text_input": "a", "max_tokens": 2**80}, "max_tokens must be"),
    "generate: negative temperature": (GENERATE, {"text_input": "a", "temperature": -1}, "temperature must be"),
    "generate: temperature as a list": (GENERATE, {"text_input": "a", "temperature": [1]}, "temperature must be"),
    "generate: top_k below -1": (GENERATE, {"text_input": "a", "top_k": -2}, "top_k must be"),
    "generate: stop of numbers": (GENERATE, {"text_input": "a", "stop": [1]}, "stop must be"),
    "generate: empty stop": (GENERATE, {"text_input": "a", "stop": [""]}, "stop must hold non-empty"),
    "generate: stop token that is none": (GENERATE, {"text_input": "a", "stop_token_ids": [999]}, "stop_token_ids"),
    "generate: bias of no token": (GENERATE, {"text_input": "a", "logit_bias": {"x": 1}}, "is not a token id"),
    "generate: bias of an unknown token": (GENERATE, {"text_input": "a", "logit_bias": {"999": 1}}, "logit_bias"),
    "generate: bias too large": (GENERATE, {"text_input": "a", "logit_bias": {"1": 1e9}}, "logit_bias[1]"),
    "generate: logprobs beyond the limit": (GENERATE, {"text_input": "a", "logprobs": 21}, "logprobs must be"),
    "generate: salt is empty": (GENERATE, {"text_input": "a", "cache_salt": ""}, "cache_salt must have"),
    "generate: priority beyond 32 bits": (GENERATE, {"text_input": "a", "priority": 2**40}, "priority must be"),
    "generate: no time": (GENERATE, {"text_input": "a", "timeout_seconds": 0}, "timeout_seconds must be"),
    "generate: negative microseconds": (GENERATE, {"text_input": "a", "timeout": -1}, "timeout must be"),
    "stream: no prompt": (STREAM, {}, "text_input (BYTES) or input_ids (INT64) is required"),
    "stream: unknown parameter": (STREAM, {"text_input": "a", "parameters": {"x": 1}}, "unknown parameter 'x'"),
    "stream: prompt longer than the context": (STREAM, {"text_input": "a b " * 400}, "context"),
    "completions: no prompt": (COMPLETIONS, {}, "prompt"),
    "completions: prompt is a number": (COMPLETIONS, {"prompt": 3}, "prompt must be a string"),
    "completions: no prompts": (COMPLETIONS, {"prompt": []}, "not empty"),
    "completions: an empty list of ids": (COMPLETIONS, {"prompt": [[]]}, "at least one id"),
    "completions: mixed prompts": (COMPLETIONS, {"prompt": ["a", 1]}, "prompt must be a string"),
    "completions: negative ids": (COMPLETIONS, {"prompt": [-1, 2]}, "none below 0"),
    "completions: temperature as text": (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    "completions: n of zero": (COMPLETIONS, {"prompt": "a", "n": 0}, "n must be"),
    "completions: stream is text": (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
    "completions: stream options alone": (
        COMPLETIONS,
        {"prompt": "a", "stream_options": {"include_usage": True}},
        "stream_options",
    ),
    "completions: bias as a list": (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, "logit_bias"),
    "completions: stop of numbers": (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop"),
    "completions: logprobs beyond the limit": (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs must be"),
    "completions: fewest above most": (COMPLETIONS, {"prompt": "a", "min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    "completions: streamed, refused before it starts": (
        COMPLETIONS,
        {"prompt": "a", "stream": True, "max_tokens": 10**6},
        "max_tokens",
    ),
    "chat: no messages": (CHAT, {}, "messages"),
    "chat: empty conversation": (CHAT, {"messages": []}, "messages is empty"),
    "chat: messages is text": (CHAT, {"messages": "hi"}, "messages"),
    "chat: message without a role": (CHAT, {"messages": [{"content": "hi"}]}, "role"),
    "chat: content is a number": (CHAT, {"messages": [{"role": "user", "content": 3}]}, "content"),
    "chat: text part without text": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    "chat: top_logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "logprobs: true"),
    "chat: too many top_logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    "chat: negative limit": (CHAT, {"messages": MESSAGES, "max_completion_tokens": -1}, "max_tokens"),
    "chat: streamed, longer than the context": (
        CHAT,
        {"messages": [{"role": "user", "content": "a b " * 400}], "stream": True},
        "context",
    ),
    "tokenize: nothing": ("/tokenize", {}, "exactly one of prompt"),
    "tokenize: both": ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "exactly one of prompt"),
    "tokenize: a number": ("/tokenize", {"prompt": 1}, "prompt"),
    "detokenize: nothing": ("/detokenize", {}, "tokens"),
    "detokenize: text": ("/detokenize", {"tokens": "a"}, "tokens"),
    "detokenize: beyond the vocabulary": (
        "/detokenize",
        {"tokens": [1, 100_000]},
        "100000; ids of this model are below",
    ),
    "detokenize: negative": ("/detokenize", {"tokens": [-1]}, "token ids"),
    "index: ready is text": ("/v2/repository/index", {"ready": "x"}, "ready must be"),
    "load: a list": ("/v2/repository/models/demo/load", [], "JSON object"),
}


@pytest.mark.parametrize("case", BAD_JSON_VALUES)
def test_bad_value_is_a_400_that_says_what_is_wrong(harness: RestHarness, case: str) -> None:
    path, body, words = BAD_JSON_VALUES[case]
    answer = harness.client.post(path, content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    assert words in message_of(answer)


BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "cut short": b'{"text_input": "a"',
    "no JSON": b"text_input=a",
    "a list": b"[]",
    "null": b"null",
    "invalid UTF-8": b'{"text_input": "\xff\xfe"}',
    "UTF-16": '{"text_input": "a"}'.encode("utf-16"),
    "a lone surrogate": b'{"text_input": "\\ud800"}',
    "NaN": b'{"text_input": "a", "temperature": NaN}',
    "infinity": b'{"text_input": "a", "temperature": Infinity}',
    "a number beyond floats": b'{"text_input": "a", "temperature": 1e999}',
    "deep nesting": b'{"text_input": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep nesting in an unknown field": b'{"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "something behind the object": b'{"text_input": "a"} {}',
}


@pytest.mark.parametrize("path", [INFER, STREAM, CHAT, "/tokenize"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_body_that_is_no_json_object_is_a_400(harness: RestHarness, path: str, case: str) -> None:
    answer = harness.client.post(path, content=BAD_BODIES[case], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert message_of(answer)


NOT_SUPPORTED: dict[str, tuple[str, Any]] = {
    "tools of a completion": ("/v1/completions", {"prompt": "x", "tools": [{"type": "function"}]}),
    "functions": (CHAT, {"messages": MESSAGES, "functions": [{}]}),
    "images": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    "audio": (CHAT, {"messages": MESSAGES, "modalities": ["text", "audio"]}),
    "echo of a conversation": (CHAT, {"messages": MESSAGES, "echo": True}),
    "best of": (COMPLETIONS, {"prompt": "a", "best_of": 3}),
    "suffix": (COMPLETIONS, {"prompt": "a", "suffix": "b"}),
    "beam search": (COMPLETIONS, {"prompt": "a", "use_beam_search": True}),
    "what prefill and decode say to each other": (COMPLETIONS, {"prompt": "a", "kv_transfer_params": {"x": 1}}),
    "SGLang's stop_regex": (COMPLETIONS, {"prompt": "a", "stop_regex": "a+"}),
    "llama.cpp's samplers": (COMPLETIONS, {"prompt": "a", "mirostat": 2}),
    "embeddings": ("/v1/embeddings", {"input": "a"}),
    "classification": (
        INFER,
        {"inputs": [TEXT], "outputs": [{"name": "text_output", "parameters": {"classification": 1}}]},
    ),
    "shared memory": (INFER, {"inputs": [{**TEXT, "parameters": {"shared_memory_region": "x"}}]}),
    "echoed logprobs of several streams": (
        COMPLETIONS,
        {"prompt": "a", "echo": True, "logprobs": 1, "n": 2, "stream": True},
    ),
}


@pytest.mark.parametrize("case", NOT_SUPPORTED)
def test_what_this_server_does_not_have_is_a_400_with_a_sentence(harness: RestHarness, case: str) -> None:
    """A 501 would be sent again, three times, by OpenAI's SDKs."""
    path, body = NOT_SUPPORTED[case]
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 400
    if path.startswith("/v1/"):
        assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert any(words in message_of(answer) for words in ("not supported", "cannot", "--task embed"))


@pytest.mark.parametrize(
    "body",
    [{"length_penalty": 1.5}, {"typical_p": 1.0}, {"mirostat": 0}, {"do_sample": True}, {"separate_reasoning": True}],
    ids=lambda body: next(iter(body)),
)
def test_what_asks_for_nothing_that_is_not_there_is_taken(harness: RestHarness, body: dict[str, Any]) -> None:
    assert harness.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1, **body}).status_code == 200


@pytest.mark.parametrize("name", ["max_new_tokens", "repeat_penalty", "n_predict"])
def test_anothers_name_of_a_field_is_refused_with_this_servers(harness: RestHarness, name: str) -> None:
    answer = harness.client.post(COMPLETIONS, json={"prompt": "a", name: 2})
    own = "repetition_penalty" if "penalty" in name else "max_tokens"
    assert (answer.status_code, own in message_of(answer)) == (400, True)


TOO_LONG = {
    "a prompt of text": (COMPLETIONS, {"prompt": "word " * 100}),
    "a prompt of many characters": (COMPLETIONS, {"prompt": "x" * 8000}),
    "a prompt of ids": (COMPLETIONS, {"prompt": [1] * 128}),
    "max_tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 128}),
    "a conversation": (CHAT, {"messages": [{"role": "user", "content": "word " * 100}]}),
    "a conversation of many characters": (CHAT, {"messages": [{"role": "user", "content": "x" * 8000}]}),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_a_context_overflow_has_the_code_and_the_words_that_litellm_and_langchain_look_for(
    harness: RestHarness, case: str
) -> None:
    path, body = TOO_LONG[case]
    answer = harness.client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
    )
    assert "this model's maximum context length is" in error["message"].lower()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_another_model_is_404(harness: RestHarness, path: str) -> None:
    answer = harness.client.post(path, json={"model": "gpt-4", "prompt": "a", "messages": MESSAGES})
    assert answer.status_code == 404
    assert "'gpt-4'" in message_of(answer)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/nothing", "/nothing"),
        ("/v1/nothing", "/v1/nothing"),
        ("/v2/models", "/v2/models"),
        # Names of models may have slashes.
        ("/v2/models/demo/explain", "'demo/explain'"),
        ("/v1/models/demo/x", "'demo/x'"),
    ],
)
def test_unknown_routes_are_404_in_json(harness: RestHarness, path: str, named: str) -> None:
    answer = harness.client.get(path)
    assert answer.status_code == 404
    assert named in message_of(answer)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", INFER), ("PUT", CHAT), ("DELETE", "/health"), ("POST", "/metrics")]
)
def test_wrong_methods_are_405_in_json(harness: RestHarness, method: str, path: str) -> None:
    answer = harness.client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert method in message_of(answer)


BAD_LENGTHS = ["x", "-1", "1.5", "99999", "9" * 40, "", "²"]


@pytest.mark.parametrize("length", BAD_LENGTHS)
def test_wrong_inference_header_content_length_is_a_400(harness: RestHarness, length: str) -> None:
    body = json.dumps({"inputs": [TEXT]})
    answer = harness.client.post(INFER, content=body, headers={b"Inference-Header-Content-Length": length.encode()})
    assert answer.status_code == 400
    assert "Inference-Header-Content-Length" in message_of(answer)


def binary(
    raw: bytes, shape: list[int], datatype: str = "BYTES", name: str = "text_input"
) -> tuple[bytes, dict[str, str]]:
    entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [entry]}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


BAD_BINARY: dict[str, tuple[tuple[bytes, dict[str, str]], str]] = {
    "length cut short": (binary(b"\x01\x00", [1]), "ends beyond the data"),
    "element cut short": (binary(b"\x09\x00\x00\x00ab", [1]), "ends beyond the data"),
    "length of 4 GiB": (binary(b"\xff\xff\xff\xffab", [1]), "ends beyond the data"),
    "fewer elements": (binary(b"\x01\x00\x00\x00a", [2]), "needs 2 BYTES elements"),
    "more elements": (binary(b"\x01\x00\x00\x00a" * 2, [1]), "needs 1 BYTES elements"),
    "invalid UTF-8": (binary(b"\x01\x00\x00\x00\xff", [1]), "not valid UTF-8"),
    "odd number of bytes": (binary(b"\x01" * 9, [1], "INT64", "input_ids"), "needs 8 bytes"),
    "negative ids": (binary(b"\xff" * 8, [1], "INT64", "input_ids"), "token ids"),
    "floats": (binary(b"\x00" * 4, [1], "FP32", "input_ids"), "must be INT64"),
}


@pytest.mark.parametrize("case", BAD_BINARY)
def test_wrong_binary_data_is_a_400(harness: RestHarness, case: str) -> None:
    (body, headers), words = BAD_BINARY[case]
    answer = harness.client.post(INFER, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert words in message_of(answer)


def test_binary_data_that_belongs_to_nothing_is_a_400(harness: RestHarness) -> None:
    body, headers = binary(b"\x01\x00\x00\x00a", [1])
    answer = harness.client.post(INFER, content=body + b"rest", headers=headers)
    assert answer.status_code == 400
    assert "4 bytes" in message_of(answer)


def test_nan_in_a_binary_parameter_is_a_400(harness: RestHarness) -> None:
    nan = b"\x00\x00\xc0\x7f"
    entry = {"name": "temperature", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [TEXT, entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = harness.client.post(INFER, content=head + nan, headers=headers)
    assert answer.status_code == 400
    assert "NaN" in message_of(answer)


@pytest.mark.parametrize(
    ("encoding", "body", "words"),
    [
        ("gzip", b"no gzip", "cannot be decompressed"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-3], "cut short"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", "follows"),
        ("br", b"{}", "Content-Encoding must be"),
    ],
)
def test_wrong_packing_is_a_400(harness: RestHarness, encoding: str, body: bytes, words: str) -> None:
    answer = harness.client.post(GENERATE, content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == 400
    assert words in message_of(answer)


@pytest.mark.parametrize("path", [INFER, GENERATE, COMPLETIONS, CHAT, "/tokenize"])
def test_a_body_beyond_the_limit_is_413(harness: RestHarness, path: str) -> None:
    answer = harness.client.post(path, content=b"x" * (MAX_BODY + 1))
    assert answer.status_code == 413
    assert "max_body_bytes" in message_of(answer)


def test_a_chunked_body_beyond_the_limit_is_413(harness: RestHarness) -> None:
    answer = harness.client.post(GENERATE, content=(b"x" * 8192 for _ in range(20)))
    assert answer.status_code == 413


def test_a_small_body_that_unpacks_beyond_the_limit_is_413(harness: RestHarness) -> None:
    bomb = gzip.compress(b"x" * (100 * MAX_BODY))
    assert len(bomb) < MAX_BODY
    answer = harness.client.post(GENERATE, content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_wrong_timeout_header_is_a_400(harness: RestHarness, value: str) -> None:
    headers = {"X-Request-Timeout-Seconds": value}
    for path, body in ((GENERATE, {"text_input": "a"}), infer(TEXT), (COMPLETIONS, {"prompt": "a"})):
        answer = harness.client.post(path, json=body, headers=headers)
        assert answer.status_code == 400
        assert "x-request-timeout-seconds" in message_of(answer)


def raw_exchange(harness: RestHarness, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", harness.port), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_head_beyond_the_limit_is_431(harness: RestHarness) -> None:
    answer = raw_exchange(harness, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 9000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"max_header_bytes" in answer


def test_a_header_that_never_ends_is_431(harness: RestHarness) -> None:
    with socket.create_connection(("127.0.0.1", harness.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        try:
            for _ in range(100):
                connection.sendall(b"a" * 1000)
            answer = connection.recv(65536)
        except ConnectionError:  # the server closed while we were still sending
            return
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_many_requests_on_one_connection_do_not_add_up_to_a_large_head(harness: RestHarness) -> None:
    for _ in range(20):
        assert harness.client.get("/health", headers={"X-Long": "a" * 1000}).status_code == 200


def test_what_is_not_http_is_a_400(harness: RestHarness) -> None:
    answer = raw_exchange(harness, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":' in answer
