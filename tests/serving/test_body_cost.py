"""No body stops the event loop for 0.1 s or takes five times its size in memory, over REST and gRPC, whatever the route.

The short form of tests/chaos/test_body_cost.py. Stalls are of this server's own doing alone: see
tests/support/measured_server.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from pagoda.serving.auth.routes import ROUTES
from pagoda.serving.grpc.messages import ModelInferResponse
from pagoda.serving.model_paths import MODEL_NAME
from tests.support import costly_bodies as bodies
from tests.support.costly_bodies import Body, check_cost, rest_body, value
from tests.support.encoders import save_bert
from tests.support.grpc_harness import texts_of
from tests.support.measured_server import Heartbeat, MeasuredServer

MIB = 2**20
SIZE = 2 * MIB

# What once stopped the server for seconds, or took gigabytes.
KNOWN: dict[str, Body] = {
    "completions: ids, then a string": rest_body("completions", "prompt", value("small ids", SIZE, '"x"')),
    "completions: lists": rest_body("completions", "prompt", value("lists", SIZE, '"x"')),
    "completions: stop": rest_body("completions", "stop", value("small ids", SIZE, '"x"')),
    "completions: allowed_token_ids of 512 prompts": rest_body(
        "completions", "allowed_token_ids", value("ids", SIZE), prompt=["a"] * 512
    ),
    "completions: an emoji makes four bytes of each letter": rest_body(
        "completions", "user", value("letters and an emoji", SIZE)
    ),
    "chat: messages": rest_body("chat", "messages", value("small ids", SIZE, '"x"')),
    "chat: parts": rest_body("chat", "messages", value("parts", SIZE)),
    "chat: unknown fields": rest_body("chat", "chat_template_kwargs", value("keys", SIZE)),
    "ollama: messages": rest_body("ollama chat", "messages", value("messages", SIZE // 2)),
    "ollama: context": rest_body("ollama generate", "context", value("ids", SIZE)),
    "tgi: digits": rest_body("tgi", "inputs", value("digits", SIZE)),
    "tokenize: text of each token": rest_body("tokenize", "prompt", value("digits", 60_000), return_token_strs=True),
    "tokenize: digits": rest_body("tokenize", "prompt", value("digits", SIZE)),
    "detokenize": rest_body("detokenize", "tokens", value("wide ids", SIZE, "null")),
    "infer: prompts": rest_body("infer", "text_input", value("empty strings", SIZE)),
    "infer: ids": rest_body("infer", "input_ids", value("ids", SIZE)),
    "infer: stop": rest_body("infer", "stop", value("strings", SIZE)),
    "generate: logit_bias": rest_body("generate", "logit_bias", value("keys", SIZE)),
    "generate: a long id": rest_body("generate_stream", "id", value("letters", SIZE)),
    "render: ids": rest_body("completions render", "prompt", value("ids", SIZE)),
    "render: messages": rest_body("chat render", "messages", value("messages", SIZE // 2)),
    "invocations: lists": rest_body("invocations", "messages", value("lists", SIZE)),
    "decisions: objects": rest_body("decisions", "questions", value("objects", SIZE)),
    "decisions: input": rest_body("decisions", "input", value("digits", SIZE)),
    "show: a long name": rest_body("ollama show", "model", value("letters", SIZE)),
    "settings: objects": rest_body("settings", "settings", value("objects", SIZE)),
    "settings: a long value": rest_body("settings", "log_level", value("emoji", 30_000)),
    "settings: a long name": rest_body("settings", "a" * SIZE, "1"),
    "load: parameters": rest_body("load", "parameters", value("keys", SIZE)),
    "load adapter: a long path": rest_body("load adapter", "lora_path", value("letters", SIZE), lora_name="a"),
    "unload adapter: objects": rest_body("unload adapter", "lora_name", value("objects", SIZE)),
    "index: deep": rest_body("index", "ready", bodies.nested(SIZE // 2)),
    **{f"grpc: {kind}": bodies.grpc_body("ModelInfer", make(SIZE)) for kind, make in bodies.GRPC.items()},
}


POOLING: dict[str, Body] = {
    "embeddings: texts": rest_body("embeddings", "input", value("strings", SIZE)),
    "embeddings: ids": rest_body("embeddings", "input", value("ids", SIZE)),
    "embeddings: lists of ids": rest_body("embeddings", "input", value("lists of one", SIZE)),
    "embeddings: one text": rest_body("embeddings", "input", value("words", SIZE), truncate_prompt_tokens=-1),
    "score: pairs": rest_body("score", "text_2", value("empty strings", SIZE)),
    "score: many against many": rest_body("score", "text_1", value("strings", 6000), text_2=["ab"] * 1500),
    "rerank: documents": rest_body("rerank", "documents", value("strings", SIZE)),
    "rerank: objects": rest_body("rerank", "documents", value("objects", SIZE)),
    "rerank: numbers": rest_body(
        "rerank", "documents", value("ids", 30_000)
    ),  # few enough that they are not counted first
    "rerank: a long query": rest_body("rerank", "query", value("words", SIZE), documents=["ab"] * 500),
    "classify: a text": rest_body("classify", "input", value("emoji", SIZE), truncate_prompt_tokens=-1),
    "pooling: nulls": rest_body("pooling", "input", value("nulls", SIZE)),
}


def test_every_route_that_takes_a_body_is_tried() -> None:
    tried = {*bodies.REST_ROUTES.values(), *bodies.POOLING_ROUTES.values()}
    others = {"/ping", "/reset_prefix_cache", "/sleep", "/wake_up"}  # which read none
    missing = set()
    for name in ROUTES:
        method, _, path = name.partition(" ")
        if method not in ("POST", "PUT", "PATCH") or "/versions/" in path:
            continue
        path = path.removeprefix("/openai").replace(MODEL_NAME, "demo")
        if path not in tried | others and path.removeprefix("/v1") not in tried:
            missing.add(name)
    assert not missing
    assert bodies.FIELDS.keys() == bodies.REST_ROUTES.keys() | bodies.POOLING_ROUTES.keys()


@pytest.fixture(scope="module")
def pooling_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredServer]:
    directory = tmp_path_factory.mktemp("scorer")
    save_bert(directory, num_labels=1)
    with MeasuredServer(model=directory, model_name="demo") as running:
        running.wait_until_ready()
        yield running


def test_bodies_of_a_model_that_pools(pooling_server: MeasuredServer) -> None:
    for body in POOLING.values():
        check_cost(pooling_server, body)
        check_cost(pooling_server, body.deflated())

    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(body=bodies.rest_bodies(SIZE, bodies.POOLING_ROUTES))
    def ask(body: Body) -> None:
        check_cost(pooling_server, body)

    ask()


def test_an_unknown_key_costs_little_whatever_it_sends() -> None:
    with MeasuredServer(api_keys="known") as server:
        server.wait_until_ready()
        for body in (rest_body("completions", "prompt", value("ids", 24 * MIB)),):
            answer, cost = bodies.cost_of(server, body)
            assert answer.status == "401"
            assert cost.memory < 4 * MIB
        for method in ("ModelInfer", "RepositoryIndex", "ModelReady", "ServerLive"):
            content = bodies.grpc_raw_ids(24 * MIB)
            answer, cost = bodies.cost_of(server, bodies.grpc_body(method, content))
            assert answer.status in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "OK")
            assert cost.memory < 4 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[MeasuredServer]:
    with MeasuredServer(default_max_tokens=2) as running:
        running.wait_until_ready()
        yield running


def test_what_once_stopped_the_server(server: MeasuredServer) -> None:
    for body in KNOWN.values():
        check_cost(server, body)
        if not body.is_grpc:
            check_cost(server, body.deflated())


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_any_body(server: MeasuredServer, protocol: str) -> None:
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(body=bodies.rest_bodies(SIZE) if protocol == "rest" else bodies.grpc_bodies(SIZE))
    def ask(body: Body) -> None:
        check_cost(server, body)

    ask()


def test_a_large_batch_of_token_ids_is_answered_as_its_prompts_alone(server: MeasuredServer) -> None:
    prompts = [
        [(11 * row + 7 * column) % 400 + 100 for column in range(90)] for row in range(200)
    ]  # TokenIds when decoded
    options = {"max_tokens": 2, "temperature": 0}
    alone = server.client.post("/v1/completions", json={"prompt": prompts[-1], **options}).json()["choices"][0]["text"]

    choices = server.client.post("/v1/completions", json={"prompt": prompts, **options}).json()["choices"]
    assert (len(choices), choices[-1]["text"]) == (len(prompts), alone)

    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [200, 90], "data": prompts}
    for data in (prompts, [token for prompt in prompts for token in prompt]):
        infer = server.client.post(
            f"{bodies.MODEL}/infer", json={"inputs": [{**tensor, "data": data}], "parameters": options}
        )
        assert infer.json()["outputs"][0]["data"][-1] == alone

    message = bodies.infer_message()
    message.parameters["temperature"].int64_param = 0
    message.parameters["max_tokens"].int64_param = 2
    message.inputs.add(name="input_ids", datatype="INT64", shape=[200, 90])
    message.inputs[0].contents.int64_contents.extend(token for prompt in prompts for token in prompt)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        response = ModelInferResponse.FromString(call(message.SerializeToString(), timeout=60))
    assert texts_of(response)[-1] == alone


async def test_the_heartbeat_sees_a_loop_that_is_busy_and_not_one_whose_machine_is() -> None:
    heartbeat = Heartbeat(asyncio.get_running_loop())
    await asyncio.sleep(0.02)
    heartbeat.reset()
    time.sleep(0.3)  # what it looks like from inside when another process has the core
    await asyncio.sleep(0.02)
    assert heartbeat.worst < bodies.MAX_STALL_SECONDS
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass
    await asyncio.sleep(0.02)
    assert heartbeat.worst > 2 * bodies.MAX_STALL_SECONDS
    heartbeat.stop()
