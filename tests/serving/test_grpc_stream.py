"""ModelStreamInfer: many requests on one stream, deltas in order, errors that stay with their request, clean ends."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from pagoda.serving.grpc.service import MAX_REQUESTS_PER_STREAM
from tests.support.grpc_harness import HANG, WAIT, GrpcHarness, infer_request, outputs_of, texts_of
from tests.support.waiting import wait_until

FINAL = "triton_final_response"


@pytest.fixture(scope="module")
def harness() -> Iterator[GrpcHarness]:
    with GrpcHarness() as running:
        yield running


class OpenStream:
    """A stream that stays open until `close`, with its responses as they come."""

    def __init__(self, harness: GrpcHarness, **options: Any) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self.call = harness.stub("ModelStreamInfer")(iter(self._requests.get, None), **options)
        self.responses: list[Any] = []
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self.responses.append(response)
        except grpc.RpcError as error:
            self.error = error

    def send(self, request: Any) -> None:
        self._requests.put(request)

    def close(self) -> None:
        self._requests.put(None)

    def join(self) -> None:
        self._thread.join(timeout=10)
        assert not self._thread.is_alive(), "the stream did not end"


def stream(harness: GrpcHarness, *requests: Any) -> list[Any]:
    return list(harness.stub("ModelStreamInfer")(iter(requests), timeout=20))


def metrics(harness: GrpcHarness) -> str:
    return harness.metrics.render()[0].decode()


def is_final(response: Any) -> bool:
    return response.infer_response.parameters[FINAL].bool_param


def test_each_token_is_a_response_and_together_they_are_the_whole_answer(harness: GrpcHarness) -> None:
    responses = stream(harness, infer_request("hello", id="7"))
    assert [texts_of(response.infer_response) for response in responses] == [["H"], ["E"], ["L"], ["L"], ["O"]]
    assert {response.infer_response.id for response in responses} == {"7"}
    outputs = [outputs_of(response.infer_response) for response in responses]
    assert [output["output_ids"] for output in outputs] == [[n] for n in b"HELLO"]
    assert [output["finish_reason"] for output in outputs] == [[b""]] * 4 + [[b"stop"]]
    assert [output["num_output_tokens"] for output in outputs] == [[1], [2], [3], [4], [5]]
    assert all(output["num_input_tokens"] == [5] for output in outputs)
    assert [is_final(response) for response in responses] == [False] * 4 + [True]


def test_empty_final_response_comes_when_asked_for_and_is_the_only_final_one(harness: GrpcHarness) -> None:
    request = infer_request("ab", id="7", parameters={"triton_enable_empty_final_response": True})
    responses = stream(harness, request)
    assert [is_final(response) for response in responses] == [False, False, True]
    assert not responses[-1].infer_response.outputs
    assert responses[-1].infer_response.id == "7"


@pytest.mark.parametrize("as_tensor", [True, False])
def test_stream_false_gives_one_whole_answer(harness: GrpcHarness, as_tensor: bool) -> None:
    request = infer_request("hello", parameters={} if as_tensor else {"stream": False})
    if as_tensor:
        request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(False)
    (response,) = stream(harness, request)
    assert texts_of(response.infer_response) == ["HELLO"]
    assert is_final(response)


def test_requests_of_one_stream_run_side_by_side(harness: GrpcHarness) -> None:
    opened = OpenStream(harness)
    opened.send(infer_request(WAIT, id="slow"))
    opened.send(infer_request("quick", id="quick"))
    wait_until(lambda: len(opened.responses) == 5)
    assert {response.infer_response.id for response in opened.responses} == {"quick"}
    opened.call.cancel()
    opened.join()


def test_many_requests_on_one_stream_each_come_whole_and_in_order(harness: GrpcHarness) -> None:
    requests = [infer_request(f"prompt {number}", id=str(number)) for number in range(MAX_REQUESTS_PER_STREAM + 50)]
    joined: dict[str, str] = defaultdict(str)
    for response in stream(harness, *requests):
        joined[response.infer_response.id] += texts_of(response.infer_response)[0]
    assert joined == {str(number): f"PROMPT {number}" for number in range(len(requests))}


def test_several_sequences_of_a_request_say_whose_a_piece_is(harness: GrpcHarness) -> None:
    responses = stream(harness, infer_request(["ab", "cde"], parameters={"n": 2}))
    joined: dict[tuple[int, int], str] = defaultdict(str)
    for response in responses:
        parameters = response.infer_response.parameters
        key = (parameters["prompt_index"].int64_param, parameters["sequence_index"].int64_param)
        joined[key] += texts_of(response.infer_response)[0]
    assert joined == {(0, 0): "AB", (0, 1): "AB", (1, 0): "CDE", (1, 1): "CDE"}
    assert [is_final(response) for response in responses].count(True) == 1
    assert is_final(responses[-1])


def test_an_error_is_a_message_with_the_requests_id_and_the_stream_goes_on(harness: GrpcHarness) -> None:
    opened = OpenStream(harness)
    opened.send(infer_request("hi", id="bad", parameters={"max_tokens": 0}))
    wait_until(lambda: opened.responses)
    opened.send(infer_request("hi", id="good"))
    opened.close()
    opened.join()
    assert opened.error is None
    assert "max_tokens" in opened.responses[0].error_message
    assert opened.responses[0].infer_response.id == "bad"
    assert [texts_of(response.infer_response) for response in opened.responses[1:]] == [["H"], ["I"]]


def test_an_error_after_some_tokens_follows_them(harness: GrpcHarness) -> None:
    responses = stream(harness, infer_request("fail:engine_dead", id="1"), infer_request("bug", id="2"))
    by_id: dict[str, list[Any]] = defaultdict(list)
    for response in responses:
        by_id[response.infer_response.id].append(response)
    assert [response.error_message for response in by_id["1"]] == ["", "failed as asked"]
    assert "secret" not in by_id["2"][-1].error_message
    assert by_id["2"][-1].error_message


def test_cancelling_the_stream_aborts_everything_in_it(harness: GrpcHarness) -> None:
    num_left = len(harness.generator.left)
    opened = OpenStream(harness)
    for prompt in (HANG, WAIT, HANG):
        opened.send(infer_request(prompt))
    wait_until(lambda: len(opened.responses) == 2)
    opened.call.cancel()
    wait_until(lambda: len(harness.generator.left) == num_left + 3)
    opened.join()


def test_a_lost_connection_aborts_everything_in_it(harness: GrpcHarness) -> None:
    num_left = len(harness.generator.left)
    channel = grpc.insecure_channel(harness.address, options=[("grpc.use_local_subchannel_pool", 1)])
    call = harness.stub("ModelStreamInfer", channel)(iter([infer_request(HANG)]))
    next(call)
    channel.close()
    opened = OpenStream(harness)
    wait_until(lambda: len(harness.generator.left) == num_left + 1)
    opened.close()
    opened.join()


def test_clients_that_vanish_in_the_middle_leave_no_request_and_no_error_behind() -> None:
    def vanish(harness: GrpcHarness, number: int) -> None:
        channel = grpc.insecure_channel(harness.address, options=[("grpc.use_local_subchannel_pool", 1)])
        requests = [infer_request("x" * 30, id=str(index)) for index in range(10)]
        call = harness.stub("ModelStreamInfer", channel)(iter(requests))
        with suppress(grpc.RpcError, ValueError):
            for _ in range(number % 17):
                next(call)
        if number % 2:
            call.cancel()
        channel.close()

    with GrpcHarness() as harness:
        threads = [threading.Thread(target=vanish, args=(harness, number)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        opened = OpenStream(harness)
        opened.send(infer_request("ok"))
        opened.close()
        opened.join()
        wait_until(lambda: harness.generator.num_running == 0)
        assert harness.generator.left
    assert 'request_errors_total{kind="internal",model_name="demo"} 0.0' in metrics(harness)


def test_deadline_of_the_stream_ends_what_runs_in_it(harness: GrpcHarness) -> None:
    num_left = len(harness.generator.left)
    opened = OpenStream(harness, timeout=1.5)
    opened.send(infer_request(HANG))
    opened.join()
    assert opened.error is not None
    assert opened.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: len(harness.generator.left) == num_left + 1)


def test_raw_input_in_a_stream(harness: GrpcHarness) -> None:
    request = infer_request(None)
    request.inputs.add(name="input_ids", datatype="INT32", shape=[2])
    request.raw_input_contents.append(bytes([0, 0, 0, 0, 1, 0, 0, 0]))
    responses = stream(harness, request)
    assert [texts_of(response.infer_response) for response in responses] == [["A"], ["B"]]
