"""Several models in a real server: engines that are loaded, unloaded, put to sleep and killed beside one that streams."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import httpx
import psutil

from tests.support.checkpoints import SMALL, shared_checkpoint
from tests.support.child_processes import children_running
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

BODY = {"prompt": "the cat sat", "max_tokens": 96, "temperature": 0, "ignore_eos": True}


def engines(server: ServerProcess) -> dict[int, psutil.Process]:
    """The engine processes of a server, in the order in which they were started."""
    return {child.pid: child for child in children_running("pagoda.engine.core.process", server.process.pid)}


def complete(server: ServerProcess, model: str) -> str:
    answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json={"model": model, **BODY}, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def state(server: ServerProcess, name: str) -> str:
    models = server.client.get("/health").json()["models"]
    return str(next(model["state"] for model in models if model["name"] == name))


def test_a_model_comes_goes_sleeps_and_dies_while_another_streams() -> None:
    checkpoint = {"model": str(shared_checkpoint())}
    with (
        ServerProcess(
            models=json.dumps({"chat": checkpoint, "other": checkpoint}), load_models="chat", models_memory_bytes="4GiB"
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        wait_until(lambda: state(server, "chat") == "ready", seconds=120)
        (chat,) = engines(server)
        alone = complete(server, "chat")
        streams: list[Future[str]] = []

        def keep_streaming() -> None:
            num_open = sum(not stream.done() for stream in streams)
            streams.extend(pool.submit(complete, server, "chat") for _ in range(4 - num_open))

        keep_streaming()
        post = server.client.post
        assert post("/v2/repository/models/other/load", timeout=120).status_code == 200
        keep_streaming()
        assert complete(server, "other") == alone  # the same checkpoint
        (other,) = engines(server).keys() - {chat}
        loaded = psutil.Process(other).memory_info().rss
        assert post("/sleep?model=other").status_code == 200
        assert psutil.Process(other).memory_info().rss < loaded
        keep_streaming()
        assert complete(server, "other") == alone  # it wakes
        psutil.Process(other).kill()
        wait_until(lambda: engines(server).keys() - {chat, other}, seconds=60)
        keep_streaming()
        wait_until(lambda: state(server, "other") == "ready", seconds=60)
        assert complete(server, "other") == alone  # by its restarted engine
        assert post("/v2/repository/models/other/unload").status_code == 200
        wait_until(lambda: engines(server).keys() == {chat})
        keep_streaming()
        assert {stream.result() for stream in streams} == {alone}
        assert state(server, "other") == "unloaded"
        metrics = server.client.get("/metrics").text
        assert 'pagoda_engine_restarts_total{model_name="chat"} 0.0' in metrics
        assert 'pagoda_engine_restarts_total{model_name="other"} 1.0' in metrics
        assert post("/settings", json={}).status_code == 405  # GET and PATCH only
        changed = server.client.patch("/settings?model=chat", json={"max_num_seqs": 2, "max_num_batched_tokens": 64})
        assert changed.status_code == 200, changed.text
        refused = server.client.patch(
            "/settings?model=chat", json={"max_num_seqs": 4096, "max_num_batched_tokens": 4096}
        )
        assert (refused.status_code, "sized at start" in refused.text) == (400, True), refused.text
        assert complete(server, "chat") == alone


def test_a_server_of_one_model_changes_to_other_weights_under_requests() -> None:
    other = str(shared_checkpoint(replace(SMALL, seed=SMALL.seed + 1)))
    with ServerProcess(model_name="demo") as server, ThreadPoolExecutor(4) as pool:
        server.wait_until_ready()
        (first,) = engines(server)
        body = {
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [BODY["prompt"]]}],
            "parameters": {"max_tokens": 96, "temperature": 0, "ignore_eos": True},
        }

        def infer() -> tuple[str, str]:
            answer = httpx.post(f"http://127.0.0.1:{server.port}/v2/models/demo/infer", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
            return answer.json()["model_version"], outputs["text_output"][0]

        def load(**config: str) -> httpx.Response:
            parameters = {"config": json.dumps(config)}
            path = "/v2/repository/models/demo/load"
            return server.client.post(path, json={"parameters": parameters}, timeout=120)

        alone = dict([infer()])
        broken = load(model="/nothing/is/here")
        assert (broken.status_code, "/nothing/is/here" in broken.text) == (400, True), broken.text
        loading = pool.submit(load, model=other)
        answers = []
        while not loading.done():
            answers += [one.result() for one in [pool.submit(infer) for _ in range(3)]]
        assert loading.result().status_code == 200, loading.result().text
        answers += [one.result() for one in [pool.submit(infer) for _ in range(3)]]
        wait_until(lambda: first not in engines(server))
        alone |= dict([infer()])
        assert alone.keys() == {"1", "2"}
        assert alone["1"] != alone["2"]
        assert dict(answers).keys() == {"1", "2"}
        assert set(answers) == set(alone.items())
        assert complete(server, "demo") == alone["2"]
