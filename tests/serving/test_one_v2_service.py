"""REST, gRPC and the generate extension answer one question with one sentence, and agree on the state of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from pagoda.engine.health import EngineState
from pagoda.serving.grpc.messages import (
    ModelInferRequest,
    RepositoryIndexResponse,
    message_class,
)
from pagoda.serving.grpc.server import GrpcServer
from tests.support.grpc_harness import call_method
from tests.support.rest_harness import RestHarness

CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
PARAMETERS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


class BothHarness(RestHarness):
    """A REST and a gRPC server over one context."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(grpc_port=0, **settings)

    async def _start(self) -> None:
        await super()._start()
        self.grpc = GrpcServer(self.context, self.service)
        await self.grpc.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc.port}")

    async def stop(self) -> None:
        self.channel.close()
        await self.grpc.stop(0)
        await super().stop()

    def rest_error(self, path: str, body: Any = None) -> str:
        answer = self.client.get(path) if body is None else self.client.post(path, json=body)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        return error["message"] if isinstance(error, dict) else error

    def grpc_error(self, method: str, request: Any) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            call_method(self.channel, method)(request, timeout=20)
        return caught.value.details()

    def grpc_stream_error(self, request: Any) -> str:
        (response,) = call_method(self.channel, "ModelStreamInfer")(iter([request]), timeout=20)
        return response.error_message


@pytest.fixture(scope="module")
def both() -> Iterator[BothHarness]:
    with BothHarness() as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[BothHarness]:
    with BothHarness(is_ready=False) as running:
        yield running


Input = tuple[str, str, list[int], list[Any]]
TEXT: Input = ("text_input", "BYTES", [1], ["a"])


@dataclass
class Case:
    """A bad request as every protocol can spell it; `generate` is None where that extension has no word for it."""

    inputs: list[Input] = field(default_factory=lambda: [TEXT])
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    model: str = "demo"
    version: str = ""
    generate: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        return f"/v2/models/{self.model}" + (f"/versions/{self.version}" if self.version else "")

    def rest(self) -> dict[str, Any]:
        names = ("name", "datatype", "shape", "data")
        body = {"inputs": [dict(zip(names, one, strict=True)) for one in self.inputs], "parameters": self.parameters}
        return body | ({"outputs": [{"name": name} for name in self.outputs]} if self.outputs else {})

    def grpc(self) -> Any:
        request = ModelInferRequest(model_name=self.model, model_version=self.version)
        for name, datatype, shape, data in self.inputs:
            tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
            values = [value.encode() for value in data] if datatype == "BYTES" else data
            getattr(tensor.contents, CONTENTS[datatype]).extend(values)
        for name, value in self.parameters.items():
            setattr(request.parameters[name], PARAMETERS[type(value)], value)
        for name in self.outputs:
            request.outputs.add(name=name)
        return request


def parameter(**parameters: Any) -> Case:
    return Case(parameters=parameters, generate={"text_input": "a", "parameters": parameters})


LONG_TEXT = "a b " * 400
CASES = {
    "another model": Case(model="other", generate={"text_input": "a"}),
    "another version": Case(version="2", generate={"text_input": "a"}),
    "no prompt": Case(inputs=[], generate={}),
    "two prompts of two kinds": Case(
        inputs=[TEXT, ("input_ids", "INT64", [1], [1])], generate={"text_input": "a", "input_ids": [1]}
    ),
    "an empty prompt": Case(inputs=[("text_input", "BYTES", [1], [""])], generate={"text_input": ""}),
    "a prompt beyond the context": Case(
        inputs=[("text_input", "BYTES", [1], [LONG_TEXT])], generate={"text_input": LONG_TEXT}
    ),
    "no token ids": Case(inputs=[("input_ids", "INT64", [0], [])], generate={"input_ids": []}),
    "a negative token id": Case(inputs=[("input_ids", "INT64", [1], [-1])], generate={"input_ids": [-1]}),
    "a token id beyond the vocabulary": Case(
        inputs=[("input_ids", "INT64", [1], [10**6])], generate={"input_ids": [10**6]}
    ),
    "an unknown parameter": parameter(max_token=3),
    "no tokens": parameter(max_tokens=0),
    "tokens beyond the context": parameter(max_tokens=10**6),
    "a parameter of the wrong type": parameter(temperature="hot"),
    "a parameter out of range": parameter(temperature=-1.0),
    "a bias that is no JSON": parameter(logit_bias="x"),
    "a salt that is empty": parameter(cache_salt=""),
    "no time": parameter(timeout_seconds=0.0),
    "prompt_logprobs": parameter(prompt_logprobs=1),
    "an unknown input": Case(inputs=[TEXT, ("prompt", "BYTES", [1], ["a"])]),
    "an input given twice": Case(inputs=[TEXT, TEXT]),
    "an unknown datatype": Case(inputs=[("text_input", "INT64", [1], [1])]),
    "fewer elements than the shape says": Case(inputs=[("text_input", "BYTES", [2], ["a"])]),
    "a parameter for three of one prompt": Case(inputs=[TEXT, ("top_k", "INT32", [3], [1, 2, 3])]),
    "a parameter as tensor and as parameter": Case(
        inputs=[TEXT, ("top_k", "INT32", [1], [1])], parameters={"top_k": 1}
    ),
    "an unknown output": Case(outputs=["text"]),
    "an output named twice": Case(outputs=["text_output", "text_output"]),
    "too many sequences": Case(inputs=[("text_input", "BYTES", [9], ["a"] * 9)], parameters={"n": 64}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_gets_the_same_sentence_from_every_protocol(both: BothHarness, name: str) -> None:
    case = CASES[name]
    sentence = both.rest_error(f"{case.path}/infer", case.rest())
    assert both.grpc_error("ModelInfer", case.grpc()) == sentence
    assert both.grpc_stream_error(case.grpc()) == sentence
    if case.generate is not None:
        assert both.rest_error(f"{case.path}/generate", case.generate) == sentence
        assert both.rest_error(f"{case.path}/generate_stream", case.generate) == sentence


def test_methods_that_give_one_response_refuse_to_stream_in_the_same_sentence(both: BothHarness) -> None:
    case = parameter(stream=True)
    sentence = both.rest_error(f"{case.path}/infer", case.rest())
    assert "generate_stream" in sentence
    assert "ModelStreamInfer" in sentence
    assert both.grpc_error("ModelInfer", case.grpc()) == sentence
    assert both.rest_error(f"{case.path}/generate", case.generate) == sentence


@pytest.mark.parametrize(("name", "version"), [("other", ""), ("demo", "2")])
def test_another_model_or_version_gets_the_same_sentence_from_every_method(
    both: BothHarness, name: str, version: str
) -> None:
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    sentence = both.rest_error(path)
    assert both.rest_error(f"{path}/ready") == sentence
    for method in ("ModelMetadata", "ModelReady", "ModelConfig"):
        request = message_class(f"{method}Request")(name=name, version=version)
        assert both.grpc_error(method, request) == sentence
    if version:
        return
    for action, method in (("load", "RepositoryModelLoad"), ("unload", "RepositoryModelUnload")):
        assert both.rest_error(f"/v2/repository/models/{name}/{action}", {}) == sentence
        assert both.grpc_error(method, message_class(f"{method}Request")(model_name=name)) == sentence
    assert both.rest_error(f"/v1/models/{name}") == sentence
    assert both.rest_error("/v1/completions", {"model": name, "prompt": "a"}) == sentence


def test_the_served_model_cannot_be_unloaded_and_every_protocol_says_so_alike(both: BothHarness) -> None:
    request = message_class("RepositoryModelUnloadRequest")(model_name="demo")
    sentence = both.rest_error("/v2/repository/models/demo/unload", {})
    assert both.grpc_error("RepositoryModelUnload", request) == sentence


def index_over_rest(both: BothHarness, *, only_ready: bool = False) -> list[dict[str, str]]:
    return both.client.post("/v2/repository/index", json={"ready": only_ready}).json()


def index_over_grpc(both: BothHarness, *, only_ready: bool = False) -> list[dict[str, str]]:
    request = message_class("RepositoryIndexRequest")(ready=only_ready)
    response = call_method(both.channel, "RepositoryIndex")(request, timeout=20)
    assert isinstance(response, RepositoryIndexResponse)
    fields = ("name", "version", "state", "reason")
    return [{name: getattr(model, name) for name in fields} for model in response.models]


def test_the_repository_index_is_the_same_in_every_state(fresh: BothHarness) -> None:
    def expect(state: str, reason: str) -> None:
        entry = {"name": "demo", "version": "1", "state": state, "reason": reason}
        for only_ready in (False, True):
            expected = [entry] if state == "READY" or not only_ready else []
            assert index_over_rest(fresh, only_ready=only_ready) == expected
            assert index_over_grpc(fresh, only_ready=only_ready) == expected

    expect("LOADING", "weights")
    fresh.run(fresh.load)
    expect("READY", "")
    for state, shown in (
        (EngineState.DEGRADED, "READY"),
        (EngineState.STARTING, "LOADING"),
        (EngineState.READY, "READY"),
        (EngineState.DRAINING, "UNAVAILABLE"),
        (EngineState.DEAD, "UNAVAILABLE"),
    ):
        fresh.call(fresh.engine.health.transition, state, f"the test wants {state}")
        expect(shown, "" if shown == "READY" else f"the test wants {state}")


def test_a_server_that_is_not_ready_says_why_alike_everywhere(fresh: BothHarness) -> None:
    case = Case()
    body = {"text_input": "a"}

    def expect(piece: str) -> None:
        sentence = fresh.rest_error("/v2/models/demo/infer", case.rest())
        assert piece in sentence
        assert fresh.grpc_error("ModelInfer", case.grpc()) == sentence
        assert fresh.rest_error("/v2/models/demo/generate", body) == sentence
        assert fresh.rest_error("/v2/models/demo/ready") == sentence
        assert fresh.rest_error("/v2/repository/models/demo/load", {}) == sentence
        assert fresh.rest_error("/v1/completions", {"prompt": "a"}) == sentence
        load = message_class("RepositoryModelLoadRequest")(model_name="demo")
        assert fresh.grpc_error("RepositoryModelLoad", load) == sentence

    expect("the model is loading (stage: weights)")
    fresh.run(fresh.load)
    fresh.call(fresh.engine.health.transition, EngineState.STARTING, "killed by the test")
    expect("the engine is restarting")
    fresh.call(fresh.context.health.drain, "a test")
    expect("shutting down")
    fresh.call(fresh.engine.health.transition, EngineState.DEAD, "no restart left")
    expect("the engine is dead: no restart left")
