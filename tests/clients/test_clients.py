"""Clients of others against a real server, each in an environment of its own: `make test-clients`.

With PAGODA_CLIENTS_MODEL=DIR they run against that checkpoint, too; of its answers only the form is checked. One
whose template shows no tools, as SmolLM2's, needs PAGODA_CLIENTS_TOOL_CALL_PARSER=hermes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.models.checkpoint_source import demo_checkpoint
from tests.support.server import ServerProcess

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PROGRAM_OF = {
    "anthropic": "anthropic_sdk.py",
    "instructor": "instructor_client.py",
    "langchain-openai": "langchain_client.py",
    "litellm": "litellm_client.py",
    "llama-index-llms-openai-like": "llama_index_client.py",
    "openai": "openai_sdk.py",
    "openai-agents": "openai_agents_client.py",
    "pydantic-ai-slim": "pydantic_ai_client.py",
}
# Of models that pool; what rerankers and embedders are asked for, by the client that asks.
POOLING_PROGRAM_OF = {
    "cohere": "cohere_client.py",
    "langchain-openai": "langchain_client.py",
    "llama-index-embeddings-openai-like": "llama_index_client.py",
}
SECONDS = 300
pytestmark = [pytest.mark.clients, pytest.mark.timeout(SECONDS + 60)]
# No setting of the server, which refuses variables that begin like its own and are none.
MODELS = [name for name in ("", os.environ.pop("PAGODA_CLIENTS_MODEL", None)) if name is not None]
TOOL_CALL_PARSER = os.environ.pop("PAGODA_CLIENTS_TOOL_CALL_PARSER", "auto")


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: Path(model).name or "demo")
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    model = Path(request.param) if request.param else demo_checkpoint()
    name = "demo" if not request.param else model.name.lower()
    settings = {"tool_call_parser": TOOL_CALL_PARSER} if request.param else {}
    with ServerProcess(
        model=model, model_name=name, kv_cache_memory_bytes="256MiB", max_model_len=2048, **settings
    ) as running:
        running.wait_until_ready()
        yield running


def test_every_pinned_client_has_a_program() -> None:
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].partition("[")[0] for line in lines if line and not line.startswith("#")}
    assert pinned == {*PROGRAM_OF, *POOLING_PROGRAM_OF}
    assert {PROGRAMS / name for name in PROGRAM_OF.values()} | {PROGRAMS / "common.py"} == set(PROGRAMS.glob("*.py"))
    assert {PROGRAMS / "pooling" / name for name in POOLING_PROGRAM_OF.values()} == set(PROGRAMS.glob("pooling/*.py"))


@pytest.fixture(scope="module")
def embedder() -> Iterator[ServerProcess]:
    """The real all-MiniLM-L6-v2: the programs check what it finds."""
    model = ROOT / ".models" / "all-MiniLM-L6-v2"
    if not model.is_dir():
        pytest.skip("the real embedding model is not here: `make real-model` fetches it")
    with ServerProcess(model=model, model_name="embedder") as running:
        running.wait_until_ready()
        yield running


@pytest.mark.parametrize("client", PROGRAM_OF)
def test_a_client_works(server: ServerProcess, client: str) -> None:
    card = server.client.get("/v1/models").json()["data"][0]
    arguments = [f"http://127.0.0.1:{server.port}", card["id"], *(["--demo"] if card["id"] == "demo" else [])]
    run_program(client, PROGRAMS / PROGRAM_OF[client], arguments)


@pytest.mark.parametrize("client", POOLING_PROGRAM_OF)
def test_a_client_of_models_that_pool_works(embedder: ServerProcess, client: str) -> None:
    arguments = [f"http://127.0.0.1:{embedder.port}", "embedder"]
    run_program(client, PROGRAMS / "pooling" / POOLING_PROGRAM_OF[client], arguments)


def run_program(client: str, program: Path, arguments: list[str]) -> None:
    python = ROOT / ".clients" / client / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{client} is not installed: make clients")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read as it is imported; else it fetches a list of prices
    ended = subprocess.run(
        [python, program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
