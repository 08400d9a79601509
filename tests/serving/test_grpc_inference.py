"""gRPC inference: both tensor forms, outputs as asked, limits and cancellation that reach the engine, honest status codes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from pagoda.engine.health import EngineState
from pagoda.errors import ErrorKind
from pagoda.serving.grpc.messages import message_class
from pagoda.serving.status import STATUS_BY_KIND
from tests.support.grpc_harness import HANG, WAIT, GrpcHarness, infer_request, outputs_of, texts_of
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness() as running:
        yield running


def raw_bytes(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def raw_request(*texts: str, **fields: Any) -> Any:
    request = infer_request(None, **fields)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(raw_bytes(*texts))
    return request


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_typed_contents_are_answered_with_raw_ones(harness: GrpcHarness) -> None:
    response = harness.infer(infer_request(["one", "three"], id="abc"))
    assert (response.model_name, response.model_version, response.id) == ("demo", "1", "abc")
    outputs = outputs_of(response)
    assert outputs["text_output"] == [b"ONE", b"THREE"]
    assert outputs["num_output_tokens"] == [3, 5]
    assert {output.name: list(output.shape) for output in response.outputs}["output_ids"] == [2, 5]
    assert outputs["output_ids"] == [79, 78, 69, -1, -1, *map(ord, "THREE")]


def test_raw_contents_are_answered_with_raw_ones(harness: GrpcHarness) -> None:
    response = harness.infer(raw_request("één", "x"))
    raw = {output.name: content for output, content in zip(response.outputs, response.raw_output_contents, strict=True)}
    assert raw["text_output"] == raw_bytes("ÉÉN", "X")
    assert struct.unpack("<2q", raw["num_output_tokens"]) == (3, 1)
    assert outputs_of(response)["num_output_tokens"] == [3, 1]


@pytest.mark.parametrize(
    ("datatype", "field"), [("INT64", "int64_contents"), ("INT32", "int_contents"), ("UINT32", "uint_contents")]
)
def test_input_ids_of_any_integer_type(harness: GrpcHarness, datatype: str, field: str) -> None:
    request = infer_request(None)
    tensor = request.inputs.add(name="input_ids", datatype=datatype, shape=[3])
    getattr(tensor.contents, field).extend([0, 1, 2])
    assert texts_of(harness.infer(request)) == ["ABC"]


def test_requested_outputs_come_alone_and_in_the_order_asked_for(harness: GrpcHarness) -> None:
    request = infer_request("hi")
    request.outputs.add(name="finish_reason")
    request.outputs.add(name="text_output")
    assert [output.name for output in harness.infer(request).outputs] == ["finish_reason", "text_output"]


def test_parameters_of_every_kind_are_understood(harness: GrpcHarness) -> None:
    request = infer_request("hello", parameters={"ignore_eos": True, "temperature": 0.5, "stop": "zz"})
    request.parameters["max_tokens"].uint64_param = 3
    request.parameters["seed"].int64_param = -7
    assert texts_of(harness.infer(request)) == ["HEL"]


def test_parameters_may_come_as_tensors_one_for_each_prompt(harness: GrpcHarness) -> None:
    request = infer_request(["hello", "world"])
    tensor = request.inputs.add(name="max_tokens", datatype="INT32", shape=[2])
    tensor.contents.int_contents.extend([1, 4])
    assert texts_of(harness.infer(request)) == ["H", "WORL"]


def test_several_sequences_add_a_dimension(harness: GrpcHarness) -> None:
    response = harness.infer(infer_request(["ab", "cd"], parameters={"n": 3}))
    assert list(response.outputs[0].shape) == [2, 3]
    assert texts_of(response) == ["AB"] * 3 + ["CD"] * 3


def test_deadline_of_the_call_ends_its_request_alone(harness: GrpcHarness) -> None:
    num_started, num_left = len(harness.generator.started), len(harness.generator.left)
    code, _ = status_of(lambda: harness.infer(infer_request(WAIT), timeout=1.0))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert texts_of(harness.infer(infer_request(["hi"]))) == ["HI"]
    assert harness.generator.left[num_left:] == [harness.generator.started[num_started]]


@pytest.mark.parametrize("parameters", [{"timeout_seconds": 0.1}, {"timeout": 100_000}])
def test_timeout_parameter_ends_the_request_before_the_call_does(
    harness: GrpcHarness, parameters: dict[str, float]
) -> None:
    code, message = status_of(lambda: harness.infer(infer_request(WAIT, parameters=parameters)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "the request's deadline passed" in message  # words of the server, not of the client


@pytest.mark.parametrize("prompt", [WAIT, HANG])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_leaves_aborts_its_request_in_the_engine(harness: GrpcHarness, prompt: str, how: str) -> None:
    num_started, num_left = len(harness.generator.started), len(harness.generator.left)
    call = harness.stub("ModelInfer").future(infer_request(prompt), timeout=1.0 if how == "deadline" else 20)
    wait_until(lambda: len(harness.generator.started) > num_started)
    if how == "cancel":
        call.cancel()
    wait_until(lambda: len(harness.generator.left) > num_left)


@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind is not ErrorKind.INTERNAL])
def test_each_kind_of_error_has_its_status_code(harness: GrpcHarness, kind: ErrorKind) -> None:
    code, message = status_of(lambda: harness.infer(infer_request(f"fail:{kind}")))
    assert code is grpc.StatusCode[STATUS_BY_KIND[kind].grpc_code]
    assert message == "failed as asked"


def test_retry_after_travels_in_the_trailers(harness: GrpcHarness) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        harness.infer(infer_request("fail:queue_full"))
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"


def test_a_fault_of_ours_is_internal_and_keeps_its_secrets(harness: GrpcHarness) -> None:
    code, message = status_of(lambda: harness.infer(infer_request("bug")))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message
    assert texts_of(harness.infer(infer_request("on"))) == ["ON"]


def test_error_answers_are_counted_and_requests_are_counted_once() -> None:
    with GrpcHarness() as harness:
        harness.infer(infer_request(["ab", "cd"], parameters={"n": 2}))
        harness.infer(infer_request("hello", parameters={"max_tokens": 2}))
        status_of(lambda: harness.infer(infer_request("x", model_name="other")))
        status_of(lambda: harness.infer(infer_request("x" * 100)))
        status_of(lambda: harness.infer(infer_request(WAIT), timeout=0.2))
        wait_until(lambda: harness.generator.left)
        body = harness.metrics.render()[0].decode()
    lines = dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))
    assert lines['pagoda_request_success_total{finished_reason="stop",model_name="demo"}'] == "4.0"
    assert lines['pagoda_request_success_total{finished_reason="length",model_name="demo"}'] == "1.0"
    assert lines['pagoda_request_success_total{finished_reason="abort",model_name="demo"}'] == "1.0"
    assert lines['pagoda_generation_tokens_total{model_name="demo"}'] == "10.0"
    assert lines['pagoda_request_errors_total{kind="not_found",model_name="demo"}'] == "1.0"
    assert lines['pagoda_request_errors_total{kind="invalid_request",model_name="demo"}'] == "1.0"


def test_metadata_names_the_server_the_model_and_its_tensors(harness: GrpcHarness) -> None:
    server = harness.stub("ServerMetadata")(message_class("ServerMetadataRequest")())
    assert server.name == "pagoda"
    assert server.version
    assert "binary_tensor_data" in server.extensions
    model = harness.stub("ModelMetadata")(message_class("ModelMetadataRequest")(name="demo"))
    assert (model.name, list(model.versions), model.platform) == ("demo", ["1"], "pagoda")
    assert [tensor.name for tensor in model.inputs] == ["text_input", "input_ids"]
    assert {tensor.name: list(tensor.shape) for tensor in model.outputs}["text_output"] == [-1]


def test_model_configuration_says_that_answers_are_decoupled(harness: GrpcHarness) -> None:
    config = harness.stub("ModelConfig")(message_class("ModelConfigRequest")(name="demo")).config
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert {tensor.name: tensor.data_type for tensor in config.input} == {"text_input": 13, "input_ids": 9}


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig"])
@pytest.mark.parametrize(("name", "version"), [("other", ""), ("", ""), ("demo", "2")])
def test_unknown_model_or_version_is_not_found(harness: GrpcHarness, method: str, name: str, version: str) -> None:
    request = message_class(f"{method}Request")(name=name, version=version)
    code, message = status_of(lambda: harness.stub(method)(request))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "demo" in message


def test_repository_has_the_one_model_and_cannot_change_it(harness: GrpcHarness) -> None:
    index = harness.stub("RepositoryIndex")(message_class("RepositoryIndexRequest")())
    assert [(model.name, model.version, model.state) for model in index.models] == [("demo", "1", "READY")]
    for fields in ({"name_or_repository": "demo"}, {"model_name": "demo"}):
        loaded = harness.stub("RepositoryModelLoad")(message_class("RepositoryModelLoadRequest")(**fields))
        assert (loaded.model_name, loaded.isLoaded) == ("demo", True)
    unload = message_class("RepositoryModelUnloadRequest")
    assert status_of(lambda: harness.stub("RepositoryModelUnload")(unload(model_name="demo")))[0] is (
        grpc.StatusCode.UNIMPLEMENTED
    )
    load = message_class("RepositoryModelLoadRequest")
    assert status_of(lambda: harness.stub("RepositoryModelLoad")(load(model_name="x")))[0] is grpc.StatusCode.NOT_FOUND


def test_while_loading_the_port_answers_and_says_at_which_stage() -> None:
    with GrpcHarness(is_ready=False) as harness:
        code, message = status_of(lambda: harness.infer(infer_request("hi")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "weights" in message
        assert harness.stub("ServerLive")(message_class("ServerLiveRequest")()).live
        assert not harness.stub("ServerReady")(message_class("ServerReadyRequest")()).ready
        assert not harness.stub("ModelReady")(message_class("ModelReadyRequest")(name="demo")).ready
        index = message_class("RepositoryIndexRequest")
        (model,) = harness.stub("RepositoryIndex")(index()).models
        assert (model.state, model.reason) == ("LOADING", "weights")
        assert not harness.stub("RepositoryIndex")(index(ready=True)).models
        harness.set_engine_state(EngineState.READY)
        assert texts_of(harness.infer(infer_request("hi"))) == ["HI"]


def test_a_dead_engine_is_neither_ready_nor_live_and_says_why() -> None:
    with GrpcHarness() as harness:
        harness.set_engine_state(EngineState.DEAD, "killed by SIGKILL")
        code, message = status_of(lambda: harness.infer(infer_request("hi")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "SIGKILL" in message
        assert not harness.stub("ServerLive")(message_class("ServerLiveRequest")()).live
        assert not harness.stub("ModelReady")(message_class("ModelReadyRequest")(name="demo")).ready
        (model,) = harness.stub("RepositoryIndex")(message_class("RepositoryIndexRequest")()).models
        assert (model.state, model.reason) == ("UNAVAILABLE", "killed by SIGKILL")
