"""Bad gRPC input: the exact status code, a sentence that helps, no internal error, and the next request is served."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from pagoda.serving.grpc.messages import InferTensorContents, message_class
from pagoda.serving.v2.tensors import DATATYPES
from tests.support.grpc_harness import GrpcHarness, infer_request, texts_of

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
TOO_LARGE = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness(max_grpc_message_bytes=100_000) as running:
        yield running


def tensor(
    name: str = "text_input",
    datatype: str = "BYTES",
    shape: tuple[int, ...] = (1,),
    parameters: tuple[str, ...] = (),
    **contents: Any,
) -> Callable[[Any], None]:
    """Adds an input to a request."""

    def add(request: Any) -> None:
        added = request.inputs.add(name=name, datatype=datatype, shape=shape)
        for key in parameters:
            added.parameters[key].string_param = "x"
        if contents:
            added.contents.CopyFrom(InferTensorContents(**contents))

    return add


def raw(*contents: bytes) -> Callable[[Any], None]:
    return lambda request: request.raw_input_contents.extend(contents)


def outputs(*names: str, **parameters: str) -> Callable[[Any], None]:
    def add(request: Any) -> None:
        for name in names:
            output = request.outputs.add(name=name)
            for key, value in parameters.items():
                output.parameters[key].string_param = value

    return add


def request_of(*parts: Callable[[Any], None], **fields: Any) -> Any:
    request = infer_request(None, **fields)
    for part in parts:
        part(request)
    return request


def with_empty_parameter() -> Any:
    request = infer_request("hi")
    request.parameters["max_tokens"].SetInParent()
    request.parameters["max_tokens"].Clear()
    return request


TEXT = tensor(bytes_contents=[b"hi"])
LENGTH_PREFIX = struct.pack("<I", 2)
CASES: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "no inputs": (request_of(), INVALID, "text_input"),
    "unknown model": (infer_request("hi", model_name="gpt"), NOT_FOUND, "demo"),
    "empty model name": (infer_request("hi", model_name=""), NOT_FOUND, "demo"),
    "unknown version": (infer_request("hi", model_version="9"), NOT_FOUND, "version"),
    "unknown input": (request_of(TEXT, tensor("prompt", bytes_contents=[b"x"])), INVALID, "prompt"),
    "input twice": (request_of(TEXT, TEXT), INVALID, "twice"),
    "text and ids": (request_of(TEXT, tensor("input_ids", "INT64", int64_contents=[1])), INVALID, "not both"),
    "unknown datatype": (request_of(tensor(datatype="STRING", bytes_contents=[b"x"])), INVALID, "datatype"),
    "empty datatype": (request_of(tensor(datatype="", bytes_contents=[b"x"])), INVALID, "datatype"),
    "text of numbers": (request_of(tensor(datatype="INT64", int64_contents=[1])), INVALID, "BYTES"),
    "ids of floats": (request_of(tensor("input_ids", "FP32", fp32_contents=[1.0])), INVALID, "INT64"),
    "negative id": (request_of(tensor("input_ids", "INT64", int64_contents=[-1])), INVALID, "token ids"),
    "contents of another type": (request_of(tensor(int64_contents=[1])), INVALID, "bytes_contents"),
    "contents in two fields": (
        request_of(tensor(bytes_contents=[b"x"], fp32_contents=[1.0])),
        INVALID,
        "fp32_contents",
    ),
    "half floats as contents": (
        request_of(TEXT, tensor("temperature", "FP16", fp32_contents=[1.0])),
        INVALID,
        "raw_input_contents",
    ),
    "no contents": (request_of(tensor()), INVALID, "elements"),
    "too few elements": (request_of(tensor(shape=(2,), bytes_contents=[b"x"])), INVALID, "2 elements"),
    "negative shape": (request_of(tensor(shape=(-1,), bytes_contents=[b"x"])), INVALID, "shape"),
    "huge shape": (request_of(tensor(shape=(2**62,), bytes_contents=[b"x"])), INVALID, "shape"),
    "shape product beyond memory": (request_of(tensor(shape=(2**30,) * 3, bytes_contents=[b"x"])), INVALID, "elements"),
    "too many dimensions": (request_of(tensor(shape=(1,) * 20, bytes_contents=[b"x"])), INVALID, "dimensions"),
    "no elements": (request_of(tensor(shape=(0,))), INVALID, "at least 1"),
    "empty text": (infer_request(""), INVALID, "prompt"),
    "prompt too long": (infer_request("x" * 100), INVALID, "prompt"),
    "value too large for INT8": (
        request_of(TEXT, tensor("top_k", "INT8", int_contents=[300])),
        INVALID,
        "INT8",
    ),
    "text is no UTF-8": (request_of(tensor(bytes_contents=[b"\xff\xfe"])), INVALID, "UTF-8"),
    "raw and typed contents": (request_of(TEXT, raw(LENGTH_PREFIX + b"hi")), INVALID, "raw_input_contents"),
    "more raw contents than inputs": (request_of(tensor(), raw(b"", b"")), INVALID, "raw_input_contents"),
    "raw contents without inputs": (request_of(raw(b"x")), INVALID, "raw_input_contents"),
    "raw text without length": (request_of(tensor(), raw(b"hi")), INVALID, "beyond"),
    "raw text cut off": (request_of(tensor(), raw(struct.pack("<I", 2**31) + b"hi")), INVALID, "beyond"),
    "raw numbers of the wrong size": (
        request_of(tensor("input_ids", "INT64", (2,)), raw(b"1234567")),
        INVALID,
        "16 bytes",
    ),
    "raw NaN": (
        request_of(
            tensor(), tensor("temperature", "FP32"), raw(LENGTH_PREFIX + b"hi", struct.pack("<f", float("nan")))
        ),
        INVALID,
        "NaN",
    ),
    "unknown parameter": (infer_request("hi", parameters={"max_token": 3}), INVALID, "max_token"),
    "parameter without value": (with_empty_parameter(), INVALID, "no value"),
    "parameter of the wrong kind": (infer_request("hi", parameters={"max_tokens": "three"}), INVALID, "max_tokens"),
    "fraction for an integer": (infer_request("hi", parameters={"max_tokens": 1.5}), INVALID, "max_tokens"),
    "boolean for an integer": (infer_request("hi", parameters={"max_tokens": True}), INVALID, "max_tokens"),
    "max_tokens 0": (infer_request("hi", parameters={"max_tokens": 0}), INVALID, "max_tokens"),
    "max_tokens beyond 32 bits": (infer_request("hi", parameters={"max_tokens": 2**40}), INVALID, "max_tokens"),
    "temperature NaN": (infer_request("hi", parameters={"temperature": float("nan")}), INVALID, "temperature"),
    "temperature infinite": (infer_request("hi", parameters={"temperature": float("inf")}), INVALID, "temperature"),
    "temperature negative": (infer_request("hi", parameters={"temperature": -1.0}), INVALID, "temperature"),
    "n too large": (infer_request("hi", parameters={"n": 10_000}), INVALID, "n must be"),
    "timeout negative": (infer_request("hi", parameters={"timeout": -1}), INVALID, "timeout"),
    "logit_bias that is no JSON": (infer_request("hi", parameters={"logit_bias": "{"}), INVALID, "JSON"),
    "empty stop string": (infer_request("hi", parameters={"stop": ""}), INVALID, "stop"),
    "parameter and tensor of one name": (
        request_of(TEXT, tensor("seed", "INT64", int64_contents=[1]), parameters={"seed": 1}),
        INVALID,
        "both",
    ),
    "parameter tensor of the wrong length": (
        request_of(TEXT, tensor("seed", "INT64", (2,), int64_contents=[1, 2])),
        INVALID,
        "shape",
    ),
    "stream without a stream": (infer_request("hi", parameters={"stream": True}), INVALID, "ModelStreamInfer"),
    "unknown output": (request_of(TEXT, outputs("logits")), INVALID, "text_output"),
    "output twice": (request_of(TEXT, outputs("text_output", "text_output")), INVALID, "twice"),
    "binary_data of the wrong kind": (
        request_of(TEXT, outputs("text_output", binary_data="yes")),
        INVALID,
        "binary_data",
    ),
    "classification of an output": (
        request_of(TEXT, outputs("text_output", classification="3")),
        UNIMPLEMENTED,
        "classif",
    ),
    "shared memory in": (request_of(tensor(parameters=("shared_memory_region",))), UNIMPLEMENTED, "shared_memory"),
    "shared memory out": (
        request_of(TEXT, outputs("text_output", shared_memory_region="r")),
        UNIMPLEMENTED,
        "shared_memory",
    ),
    "message too large": (
        infer_request("x" * 200_000),
        TOO_LARGE,
        "97.66 KiB (100000 bytes) are allowed (max_grpc_message_bytes)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_request_gets_its_status_and_the_next_one_is_served(harness: GrpcHarness, name: str) -> None:
    request, code, hint = CASES[name]
    with pytest.raises(grpc.RpcError) as caught:
        harness.infer(request)
    assert caught.value.code() is code, caught.value.details()
    assert hint in caught.value.details()
    assert texts_of(harness.infer(infer_request("ok"))) == ["OK"]


MALFORMED = {
    "no protobuf": b"\xff\xff\xff\xff",
    "cut off": infer_request("hello").SerializeToString()[:-3],
    "wrong wire type": b"\x0a\xff\xff\xff\xff\x0f",
    "name is no UTF-8": b"\x0a\x02\xff\xfe",
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "RepositoryModelLoad"])
def test_malformed_message_is_the_clients_mistake(harness: GrpcHarness, method: str, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        harness.stub(method, raw=True)(MALFORMED[name], timeout=10)
    assert caught.value.code() in (INVALID, NOT_FOUND), caught.value.details()
    assert texts_of(harness.infer(infer_request("ok"))) == ["OK"]


def test_malformed_message_in_a_stream_ends_it_after_what_came_before_is_answered(harness: GrpcHarness) -> None:
    good = infer_request("ab", id="1").SerializeToString()
    responses = harness.stub("ModelStreamInfer", raw=True)(iter([good, b"\xff\xff"]), timeout=10)
    seen = []
    with pytest.raises(grpc.RpcError) as caught:
        seen.extend(responses)
    assert caught.value.code() is INVALID


def test_a_message_that_quotes_the_client_is_cut_to_what_a_header_holds(harness: GrpcHarness) -> None:
    for name in ("x" * 50_000, "🙂" * 10_000, "line\nbreak\r\x00"):
        with pytest.raises(grpc.RpcError) as caught:
            harness.infer(infer_request("hi", model_name=name))
        assert caught.value.code() is NOT_FOUND


def test_unknown_method_is_unimplemented(harness: GrpcHarness) -> None:
    call = harness.channel.unary_unary("/inference.GRPCInferenceService/TraceSetting")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=10)
    assert caught.value.code() is UNIMPLEMENTED


names = st.sampled_from(
    ["text_input", "input_ids", "max_tokens", "temperature", "stop", "n", "seed", "stream", "timeout", "", "x"]
)
texts = st.text(max_size=8)
int64 = st.integers(-(2**63), 2**63 - 1)
shapes = st.lists(st.one_of(st.integers(-2, 4), int64), max_size=4)
small_contents = st.fixed_dictionaries(
    {},
    optional={
        "bool_contents": st.lists(st.booleans(), max_size=3),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
        "int64_contents": st.lists(int64, max_size=3),
        "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=3),
        "uint64_contents": st.lists(st.integers(0, 2**64 - 1), max_size=3),
        "fp32_contents": st.lists(st.floats(width=32), max_size=3),
        "fp64_contents": st.lists(st.floats(), max_size=3),
        "bytes_contents": st.lists(st.binary(max_size=6), max_size=3),
    },
)
parameters = st.dictionaries(
    names,
    st.one_of(
        st.none(),
        st.tuples(st.just("bool_param"), st.booleans()),
        st.tuples(st.just("int64_param"), int64),
        st.tuples(st.just("string_param"), texts),
        st.tuples(st.just("double_param"), st.floats()),
        st.tuples(st.just("uint64_param"), st.integers(0, 2**64 - 1)),
    ),
    max_size=3,
)


def set_parameters(target: Any, values: dict[str, Any]) -> None:
    for name, choice in values.items():
        target[name].SetInParent()
        if choice is not None:
            setattr(target[name], *choice)


@st.composite
def messages(draw: st.DrawFn) -> Any:
    request = message_class("ModelInferRequest")(
        model_name=draw(st.sampled_from(["demo"] * 8 + ["", "other"])),
        model_version=draw(st.sampled_from([""] * 8 + ["1", "7"])),
        id=draw(texts),
    )
    for _ in range(draw(st.integers(0, 3))):
        added = request.inputs.add(
            name=draw(names), datatype=draw(st.sampled_from([*DATATYPES, "", "BF16"])), shape=draw(shapes)
        )
        if draw(st.booleans()):
            added.contents.CopyFrom(InferTensorContents(**draw(small_contents)))
        set_parameters(added.parameters, draw(parameters))
    for name in draw(st.lists(st.sampled_from(["text_output", "logprobs", "output_ids", "x"]), max_size=2)):
        set_parameters(request.outputs.add(name=name).parameters, draw(parameters))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=12), max_size=3)))
    set_parameters(request.parameters, draw(parameters))
    return request


FINE = {
    grpc.StatusCode.OK,
    INVALID,
    NOT_FOUND,
    UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(request=messages())
@example(request=infer_request(["a", "b"], parameters={"n": 2}))
def test_no_message_makes_an_internal_error(harness: GrpcHarness, request: Any) -> None:
    try:
        harness.infer(request, timeout=5)
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    assert code in FINE


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(requests=st.lists(messages(), min_size=1, max_size=5))
def test_every_message_of_a_stream_has_one_end_and_the_stream_survives(
    harness: GrpcHarness, requests: list[Any]
) -> None:
    for number, request in enumerate(requests):
        request.id = str(number)
        request.parameters["timeout_seconds"].double_param = 2.0
    ends: Counter[str] = Counter()
    for response in harness.stub("ModelStreamInfer")(iter(requests), timeout=20):
        ends[response.infer_response.id] += response.infer_response.parameters["triton_final_response"].bool_param
    assert ends == {str(number): 1 for number in range(len(requests))}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=40), cut=st.integers(0, 60))
def test_no_bytes_make_an_internal_error(harness: GrpcHarness, noise: bytes, cut: int) -> None:
    wire = bytearray(infer_request("hello", parameters={"max_tokens": 2}).SerializeToString())
    wire[cut : cut + len(noise)] = noise
    try:
        harness.stub("ModelInfer", raw=True)(bytes(wire), timeout=5)
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    assert code in FINE


def test_after_all_that_a_good_request_is_served(harness: GrpcHarness) -> None:
    assert texts_of(harness.infer(infer_request("still here"))) == ["STILL HERE"]
    body = harness.metrics.render()[0].decode()
    assert 'pagoda_request_errors_total{kind="internal",model_name="demo"} 0.0' in body
