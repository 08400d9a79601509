"""Whatever JSON a client makes of the fields we know, it is answered, never with a fault of ours, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.serving.anthropic.types import CountTokensRequest, MessagesRequest
from pagoda.serving.openai.responses.types import ResponsesRequest
from pagoda.serving.openai.types import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from pagoda.serving.parameters import FIELDS
from pagoda.serving.v2.inference import OUTPUT_NAMES
from pagoda.serving.v2.tensors import DATATYPES
from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 0.5, 1.0, -1.0]),
    st.text(max_size=8),
    st.sampled_from(["a", "Once upon a time", "demo", "user", "text", "\ud800", "\0", "[1]", '{"5": 1}', "x" * 3000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "name", "x"]), children, max_size=3),
    ),
    max_leaves=6,
)
# Most values are right more often than a blind guess would be, so that checks behind the first are reached.
LIKELY: dict[str, Any] = {
    "prompt": st.one_of(st.just("ab"), st.lists(st.integers(0, 511), min_size=1, max_size=5)),
    "text_input": st.just("ab"),
    "messages": st.sampled_from(
        [
            [{"role": "user", "content": "hi"}],
            [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": 1}]}],
            [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}]}]}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
        ]
    ),
    "input": st.sampled_from(
        [
            "hi",
            [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            [{"type": "function_call", "name": "f", "arguments": "["}, {"type": "reasoning", "content": 1}],
        ]
    ),
    "tools": st.sampled_from(
        [
            [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}],
            [{"name": "f", "input_schema": {}}],
        ]
    ),
    "tokens": st.lists(st.integers(0, 600), max_size=5),
    "max_tokens": st.integers(1, 5),
    "model": st.just("demo"),
}


def objects(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: st.one_of(LIKELY.get(name, VALUES), VALUES) for name in names}
    return st.fixed_dictionaries({}, optional=fields)


def fields_of(model: Any) -> list[str]:
    return list(model.model_fields)


TENSORS = st.fixed_dictionaries(
    {
        "name": st.one_of(st.sampled_from(["text_input", "input_ids", *FIELDS]), VALUES),
        "datatype": st.one_of(st.sampled_from(DATATYPES), VALUES),
        "shape": st.one_of(st.lists(st.integers(-1, 3), max_size=3), VALUES),
        "data": st.one_of(st.lists(st.one_of(st.integers(0, 9), st.text(max_size=3)), max_size=4), VALUES),
    },
    optional={"parameters": VALUES},
)
INFER = st.fixed_dictionaries(
    {"inputs": st.one_of(st.lists(TENSORS, max_size=3), VALUES)},
    optional={
        "id": VALUES,
        "parameters": st.one_of(objects(list(FIELDS)), VALUES),
        "outputs": st.one_of(
            st.lists(st.fixed_dictionaries({"name": st.sampled_from(OUTPUT_NAMES)}), max_size=3), VALUES
        ),
    },
)
GENERATE = objects(["text_input", "input_ids", "id", "parameters", *FIELDS])
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/v2/models/demo/infer": INFER,
    "/v2/models/demo/generate": GENERATE,
    "/v2/models/demo/generate_stream": GENERATE,
    "/v1/completions": objects(fields_of(CompletionRequest)),
    "/v1/chat/completions": objects(fields_of(ChatCompletionRequest)),
    "/v1/responses": objects(fields_of(ResponsesRequest)),
    "/v1/messages": objects(fields_of(MessagesRequest)),
    "/v1/messages/count_tokens": objects(fields_of(CountTokensRequest)),
    "/tokenize": objects(fields_of(TokenizeRequest)),
    "/detokenize": objects(fields_of(DetokenizeRequest)),
}


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(log_level="warning", tool_call_parser="qwen3_coder", reasoning_parser="qwen3") as running:
        yield running


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_answered_with_a_fault_of_ours(harness: RestHarness, path: str) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(body=BODIES[path])
    def ask(body: Any) -> None:
        answer = harness.client.post(path, content=json.dumps(body, ensure_ascii=True))
        assert answer.status_code < 500 or answer.status_code == 504, (answer.status_code, answer.text, body)

    ask()
    wait_until(lambda: harness.engine.num_running == 0)
