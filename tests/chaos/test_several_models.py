"""Models of a server are loaded, unloaded, replaced, put to sleep and killed under load: no answer of another changes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

import httpx
import psutil
import pytest

from tests.support.checkpoints import SMALL, shared_checkpoint
from tests.support.child_processes import children_running
from tests.support.notes import Note
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

SECONDS = float(os.environ.get("TEST_CHAOS_SECONDS", "150"))
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(SECONDS + 300)]
NAMES = ("steady", "comes", "sleeps", "dies")
PROMPTS = ("the cat sat", "Once upon a time there was a server", "7 8 9 10")
MAY_REFUSE = (503, 429, 504)
"""Answers of a model that is not there now."""


def engines(server: ServerProcess) -> list[psutil.Process]:
    return children_running("pagoda.engine.core.process", server.process.pid)


def memory(server: ServerProcess) -> int:
    """Bytes of the server's process and of its engines."""
    return sum(process.memory_info().rss for process in (psutil.Process(server.process.pid), *engines(server)))


async def complete(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[int, str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text


async def test_models_come_go_sleep_and_die_under_load(note: Note) -> None:
    checkpoint, other = str(shared_checkpoint()), str(shared_checkpoint(replace(SMALL, seed=SMALL.seed + 1)))
    models = {name: {"model": checkpoint} for name in NAMES}
    chance = random.Random(5)
    with ServerProcess(
        models=json.dumps(models), load_models="steady", max_loaded_models=5, models_memory_bytes="6GiB"
    ) as server:
        server.wait_until_ready()
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
            known: dict[str, set[str]] = {}
            for prompt in PROMPTS:
                known[prompt] = {(await complete(client, "steady", prompt))[1]}
            post = client.post
            for weights, expected in ((other, 2), (checkpoint, 2)):
                parameters = {"config": json.dumps({"model": weights})}
                loaded = await post("/v2/repository/models/comes/load", json={"parameters": parameters})
                assert loaded.status_code == 200, loaded.text
                for prompt in PROMPTS:
                    known[prompt].add((await complete(client, "comes", prompt))[1])
                    assert len(known[prompt]) == expected
            assert (await post("/v2/repository/models/comes/unload")).status_code == 200
            await wait_until_async(lambda: len(engines(server)) == 1, seconds=30)
            before = memory(server)
            counts: Counter[tuple[str, int]] = Counter()
            is_over = asyncio.Event()

            async def ask(model: str) -> None:
                while not is_over.is_set():
                    prompt = chance.choice(PROMPTS)
                    status, text = await complete(client, model, prompt)
                    counts[model, status] += 1
                    if status == 200:
                        texts = known[prompt] if model == "comes" else known[prompt] & references[prompt]
                        assert text in texts, (model, prompt, text)
                    else:
                        assert model != "steady", (status, text)
                        assert status in MAY_REFUSE, (model, status, text)
                        await asyncio.sleep(0.05)

            references = {prompt: {(await complete(client, "steady", prompt))[1]} for prompt in PROMPTS}

            async def do(what: str, act: Callable[[], Awaitable[object]]) -> None:
                while not is_over.is_set():
                    await act()
                    counts[what, 0] += 1
                    await asyncio.sleep(chance.uniform(0, 0.5))

            async def load_and_unload() -> None:
                path = "/v2/repository/models/comes"
                for weights in chance.sample((checkpoint, other, "/nothing/here"), 3):
                    parameters = {"config": json.dumps({"model": weights})}
                    await post(path + "/load", json={"parameters": parameters})
                if chance.random() < 0.5:
                    await post(path + "/unload")

            async def sleep_and_wake() -> None:
                await post("/v2/repository/models/sleeps/load")
                await post("/sleep", params={"model": "sleeps", "level": chance.choice("12")})
                if chance.random() < 0.5:
                    await post("/wake_up", params={"model": "sleeps"})

            async def kill() -> None:
                await post("/v2/repository/models/dies/load")
                health = (await client.get("/health")).json()
                dying = next(model for model in health["models"] if model["name"] == "dies")
                victims = [process for process in engines(server) if process.pid not in protected]
                if dying["state"] == "ready" and victims:
                    victim = chance.choice(victims)
                    kill_if_there(victim)

            protected = {process.pid for process in engines(server)}

            async with asyncio.TaskGroup() as group:
                for model in (*NAMES, "steady", "steady"):
                    group.create_task(ask(model))
                group.create_task(do("load", load_and_unload))
                group.create_task(do("sleep", sleep_and_wake))
                group.create_task(do("kill", kill))
                await asyncio.sleep(SECONDS)
                is_over.set()
            note(f"several models for {SECONDS:g} s: {dict(sorted(counts.items()))}")
            for name in NAMES[1:]:
                assert (await post(f"/v2/repository/models/{name}/unload")).status_code == 200
            await wait_until_async(lambda: len(engines(server)) == 1, seconds=60)
            after = memory(server)
            note(f"memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
            assert after < before * 1.15 + 64 * 2**20
            for name in NAMES:
                assert counts[name, 200] > 0
            assert (await complete(client, "steady", PROMPTS[0]))[1] in references[PROMPTS[0]]
            metrics = (await client.get("/metrics")).text
            assert 'pagoda_engine_restarts_total{model_name="steady"} 0.0' in metrics


def kill_if_there(process: psutil.Process) -> None:
    """SIGKILL it, if it is still there."""
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
