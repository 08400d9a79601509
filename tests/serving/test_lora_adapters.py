"""LoRA adapters over every protocol: named in the place of the model, listed, loaded, unloaded, and those of a directory."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagoda.adapters import LoraAdapter
from pagoda.errors import ConfigError
from pagoda.serving import adapters as serving_adapters
from pagoda.serving.grpc.messages import ModelInferRequest
from tests.serving.test_one_v2_service import BothHarness
from tests.support.checkpoints import shared_checkpoint
from tests.support.grpc_harness import call_method
from tests.support.lora_adapters import adapter_of, greedy_text, write_adapter
from tests.support.rest_harness import RestHarness
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

MESSAGES = [{"role": "user", "content": "abc"}]
V2 = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["abc"]}]}

# Path, and body but for the model, which the paths of V2 have themselves.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"model": "sql", "prompt": "abc"}),
    "several prompts": ("/v1/completions", {"model": "sql", "prompt": ["abc", "de"], "n": 2, "temperature": 1}),
    "chat": ("/v1/chat/completions", {"model": "sql", "messages": MESSAGES}),
    "kserve's prefix": ("/openai/v1/chat/completions", {"model": "sql", "messages": MESSAGES}),
    "responses": ("/v1/responses", {"model": "sql", "input": "abc"}),
    "messages": ("/v1/messages", {"model": "sql", "messages": MESSAGES, "max_tokens": 4}),
    "infer": ("/v2/models/sql/infer", V2),
    "generate": ("/v2/models/sql/generate", {"text_input": "abc"}),
    "ollama": ("/api/generate", {"model": "sql", "prompt": "abc", "stream": False}),
    "ollama chat": ("/api/chat", {"model": "sql", "messages": MESSAGES, "stream": False}),
    "sagemaker": ("/invocations", {"model": "sql", "prompt": "abc"}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `sql` and `chat` of the shared checkpoint."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("sql", "chat")):
        write_adapter(root / name, shared_checkpoint(), rank=4, seed=seed)
    return root


@pytest.fixture(scope="module")
def harness(directory: Path) -> Iterator[BothHarness]:
    modules = (f"sql={directory / 'sql'}", json.dumps({"name": "org/chat", "path": str(directory / "chat")}))
    with BothHarness(
        enable_lora=True, lora_modules=modules, model_aliases=("alias",), chat_template=TEMPLATE
    ) as running:
        yield running


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_names_an_adapter_where_it_names_a_model(
    harness: BothHarness, directory: Path, path: str, body: dict[str, Any]
) -> None:
    before = len(harness.engine.submitted)
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    submitted = harness.engine.submitted[before:]
    assert {request.adapter for request in submitted} == {adapter_of(directory / "sql")}
    assert answer.json().get("model", answer.json().get("model_name")) == "sql"


def test_streams_name_it_too(harness: BothHarness) -> None:
    body = {"model": "org/chat", "messages": MESSAGES, "stream": True}
    with harness.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert {json.loads(event)["model"] for event in events[:-1]} == {"org/chat"}
    assert harness.engine.submitted[-1].adapter.name == "org/chat"


def test_grpc_and_a_gateways_header(harness: BothHarness) -> None:
    request = ModelInferRequest(model_name="sql")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"abc")
    assert call_method(harness.channel, "ModelInfer")(request, timeout=10).model_name == "sql"
    assert harness.engine.submitted[-1].adapter.name == "sql"
    headers = {"x-gateway-model-name-rewrite": "org/chat"}
    answer = harness.client.post("/v1/completions", json={"model": "demo", "prompt": "abc"}, headers=headers)
    assert answer.status_code == 200
    assert harness.engine.submitted[-1].adapter.name == "org/chat"


def test_tgi_has_a_parameter_for_it(harness: BothHarness) -> None:
    body = {"inputs": "abc", "parameters": {"adapter_id": "sql", "max_new_tokens": 2}}
    assert harness.client.post("/generate", json=body).status_code == 200
    assert harness.engine.submitted[-1].adapter.name == "sql"
    body["parameters"] = {"adapter_id": "nothing"}
    assert harness.client.post("/generate", json=body).status_code == 404


def test_the_model_itself_has_no_adapter(harness: BothHarness) -> None:
    for name in ("demo", "alias"):
        assert harness.client.post("/v1/completions", json={"model": name, "prompt": "abc"}).status_code == 200
        assert harness.engine.submitted[-1].adapter is None
    answer = harness.client.post("/v1/completions", json={"model": "nothing", "prompt": "abc"})
    assert answer.status_code == 404


def test_models_are_listed_with_their_parents(harness: BothHarness, directory: Path) -> None:
    cards = {card["id"]: card for card in harness.client.get("/v1/models").json()["data"]}
    assert list(cards) == ["demo", "alias", "sql", "org/chat"]
    assert (cards["sql"]["parent"], cards["sql"]["root"]) == ("demo", str(directory / "sql"))
    assert cards["demo"]["parent"] is None
    assert harness.client.get("/v1/models/org/chat").json() == cards["org/chat"]
    assert "sql:latest" in {model["name"] for model in harness.client.get("/api/tags").json()["models"]}
    assert harness.client.post("/api/show", json={"model": "sql"}).status_code == 200
    assert harness.client.get("/v2/models/sql").json()["name"] == "sql"
    assert harness.client.get("/v2/models/sql/ready").status_code == 200


def load(harness: RestHarness, name: str, path: Path | str, **fields: Any) -> Any:
    return harness.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def unload(harness: RestHarness, name: str) -> Any:
    return harness.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_adapters_come_and_go_while_the_server_runs(harness: BothHarness, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "new", shared_checkpoint(), rank=4, seed=7)
    first = adapter_of(path)
    answer = load(harness, "new", path)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert first in harness.engine.adapters
    assert load(harness, "new", path).status_code == 400
    harness.client.post("/v1/completions", json={"model": "new", "prompt": "abc"})
    assert harness.engine.submitted[-1].adapter == first
    write_adapter(path, shared_checkpoint(), rank=4, seed=8)
    assert load(harness, "new", path, load_inplace=True).status_code == 200
    harness.client.post("/v1/completions", json={"model": "new", "prompt": "abc"})
    second = harness.engine.submitted[-1].adapter
    assert second == adapter_of(path)
    assert second.version != first.version
    assert (first in harness.engine.adapters, second in harness.engine.adapters) == (False, True)
    answer = unload(harness, "new")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert second not in harness.engine.adapters
    assert harness.client.post("/v1/completions", json={"model": "new", "prompt": "abc"}).status_code == 404
    assert unload(harness, "new").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere"}, 400, "is no directory: a LoRA adapter is one with"),
        ({"lora_name": "demo", "lora_path": "/nowhere"}, 400, "demo is the name of a model"),
        ({"lora_name": "a b", "lora_path": "/nowhere"}, 400, "visible characters without spaces"),
        ({"lora_name": "", "lora_path": "/nowhere"}, 400, "visible characters without spaces"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": 3, "lora_path": "/nowhere"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": "/nowhere", "base_model_name": "other"}, 404, "'other' is not served here"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    harness: BothHarness, body: dict[str, Any], status: int, message: str
) -> None:
    answer = harness.client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_picker_reads_which_adapters_run_and_wait(harness: BothHarness) -> None:
    text = harness.client.get("/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{"))
    assert 'max_lora="8"' in line
    assert 'running_lora_adapters=""' in line
    assert 'waiting_lora_adapters=""' in line
    assert abs(float(line.rpartition(" ")[2]) - time.time()) < 60


def test_a_server_without_adapters_says_so(directory: Path) -> None:
    with RestHarness() as plain:
        assert "set enable_lora" in load(plain, "sql", directory / "sql").json()["error"]["message"]
        assert "lora_requests_info" not in plain.client.get("/metrics").text


def test_one_of_the_settings_that_does_not_fit_ends_the_start(tmp_path: Path) -> None:
    write_adapter(tmp_path / "large", shared_checkpoint(), rank=32)
    harness = RestHarness(enable_lora=True, lora_modules=(f"large={tmp_path / 'large'}",), is_ready=False)
    with harness, pytest.raises(ConfigError, match=r"lora_modules: large: .*has rank 32; max_lora_rank is 16"):
        harness.run(harness.load)


# ---- lora_dir -----------------------------------------------------------------------------------------------------------


def served(harness: RestHarness) -> dict[str, str]:
    """Path of each adapter by its name."""
    cards = harness.client.get("/v1/models").json()["data"]
    return {card["id"]: card["root"] for card in cards if card["parent"]}


def test_a_directory_is_what_is_served(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_adapters, "SCAN_SECONDS", 0.02)
    monkeypatch.setattr(serving_adapters, "LOOKS_BETWEEN_TRIES", 2)
    root = tmp_path / "lora"
    shutil.copytree(directory / "sql", root / "sql")
    (root / "..data").mkdir()
    with RestHarness(enable_lora=True, lora_dir=str(root)) as harness:
        assert served(harness) == {"sql": str(root / "sql")}  # before it is ready
        lists = root / "more.json"
        lists.write_text(json.dumps([{"name": "chat", "path": str(directory / "chat")}]))
        wait_until(lambda: set(served(harness)) == {"sql", "chat"})

        # Another version, then one that is broken, which leaves what is there.
        def version() -> str:
            harness.client.post("/v1/completions", json={"model": "sql", "prompt": "abc"})
            adapter: LoraAdapter = harness.engine.submitted[-1].adapter
            return adapter.version

        first = version()
        write_adapter(root / "sql", shared_checkpoint(), rank=4, seed=11)
        wait_until(lambda: version() != first)
        second = version()
        weights = (root / "sql" / "adapter_model.safetensors").read_bytes()
        (root / "sql" / "adapter_model.safetensors").write_bytes(weights[:-4])
        wait_until(
            lambda: 'lora_dir_last_sync_successful{model_name="demo"} 0.0' in harness.client.get("/metrics").text
        )
        assert version() == second

        # What the directory has is changed there only.
        assert "is of lora_dir" in unload(harness, "chat").json()["error"]["message"]
        assert load(harness, "own", directory / "chat").status_code == 200
        lists.write_text("[")
        wait_until(lambda: set(served(harness)) == {"sql", "own"})
        shutil.rmtree(root / "sql")
        lists.unlink()
        wait_until(lambda: set(served(harness)) == {"own"})
        wait_until(
            lambda: 'lora_dir_last_sync_successful{model_name="demo"} 1.0' in harness.client.get("/metrics").text
        )


def test_the_list_is_a_setting_that_changes_as_a_whole(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sql, chat = (str(directory / name) for name in ("sql", "chat"))
    with RestHarness(enable_lora=True, lora_modules=(f"sql={sql}",)) as harness:

        def change(*modules: Any) -> Any:
            return harness.client.patch("/settings", json={"lora_modules": modules})

        assert load(harness, "own", directory / "chat").status_code == 200
        with caplog.at_level(logging.INFO, "pagoda.audit"):
            answer = change({"name": "chat", "path": chat}, f"sql={sql}")
        assert answer.status_code == 200, answer.text
        assert served(harness) == {"sql": sql, "chat": chat, "own": chat}
        assert "lora_modules" in caplog.text
        refused = change("chat=/nowhere", f"new={sql}", f"demo={sql}")
        assert refused.status_code == 400
        for piece in ("lora_modules: chat: /nowhere is no directory", "demo is the name of a model"):
            assert piece in refused.json()["error"]
        assert served(harness) == {"sql": sql, "chat": chat, "own": chat}
        assert "must not hold the name chat twice" in change(f"chat={sql}", f"chat={chat}").json()["error"]
        # Changed files are another version; what is named no longer goes, what was loaded over the API stays.
        path = write_adapter(tmp_path / "sql", shared_checkpoint(), rank=4, seed=5)
        assert change(f"sql={path}").status_code == 200
        harness.client.post("/v1/completions", json={"model": "sql", "prompt": "abc"})
        assert harness.engine.submitted[-1].adapter == adapter_of(path)
        assert served(harness) == {"sql": str(path), "own": chat}
        assert change().status_code == 200
        assert served(harness) == {"own": chat}
        assert harness.client.post("/v1/completions", json={"model": "sql", "prompt": "abc"}).status_code == 404


def test_a_directory_that_cannot_be_read_changes_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_adapters, "SCAN_SECONDS", 0.02)
    root = tmp_path / "lora"
    shutil.copytree(directory / "sql", root / "sql")
    with RestHarness(enable_lora=True, lora_dir=str(root)) as harness:
        root.rename(tmp_path / "away")
        wait_until(
            lambda: 'lora_dir_last_sync_successful{model_name="demo"} 0.0' in harness.client.get("/metrics").text
        )
        assert set(served(harness)) == {"sql"}


# ---- a real engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_real_server(directory: Path, tmp_path: Path, replicas: int) -> None:
    model = shared_checkpoint()
    root = tmp_path / "lora"
    shutil.copytree(directory / "chat", root / "chat")
    settings: dict[str, Any] = {
        "lora_modules": f"sql={directory / 'sql'}",
        "lora_dir": root,
        "enable_lora": "true",
        "max_loras": 1,
        "max_cpu_loras": 2,  # an adapter that has changed and is not in memory is refused until the next look
        "dtype": "float32",
        "data_parallel_size": replicas,
    }
    with ServerProcess(model=model, **settings) as server:
        server.wait_until_ready()

        def answer(name: str, *, may_change: bool = False) -> str:
            body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            response = server.client.post("/v1/completions", json=body)
            if may_change and response.status_code == 400:  # seen between the writes of its two files
                assert "have changed" in response.text
                return ""
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"]

        expected = {"demo": greedy_text(model, None, [5, 6, 7], 8)}
        expected |= {name: greedy_text(model, directory / name, [5, 6, 7], 8) for name in ("sql", "chat")}
        assert {name: answer(name) for name in expected} == expected
        assert len(set(expected.values())) == 3
        write_adapter(root / "chat", model, rank=8, seed=21)
        changed = greedy_text(model, root / "chat", [5, 6, 7], 8)
        wait_until(lambda: answer("chat", may_change=True) == changed)
        assert answer("sql") == expected["sql"]
