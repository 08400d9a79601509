"""The rendered release of mode `single`, run as pods: how it starts, answers, drains and is upgraded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.pods.cluster import Cluster
from tests.e2e.pods.image import pagoda_image, why_not
from tests.e2e.pods.pod import Pod
from tests.e2e.pods.release import Release, steady_load
from tests.support.load import DOORS, Ask

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPT = "Once upon a time"
MAX_TOKENS = 24
VALUES: dict[str, Any] = {
    "engine": {
        "threads": 1,
        "kv_cache_memory_bytes": "64MiB",
        "tokenizer_pool_size": 1,
        "grace_period_seconds": 30,
        "fault_injection": "step#1=sleep:3",  # the warm-up's: so a probe finds the start under way
    },
    "rollout": {"preStopSeconds": 5, "minReadySeconds": 1},
    "probes": {"startup": {"periodSeconds": 2}, "readiness": {"periodSeconds": 2}},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def release(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    folder: Path = tmp_path_factory.mktemp("single")
    async with Cluster(folder, pagoda_image(folder)) as cluster:
        yield Release(cluster, VALUES)


def only_pod(release: Release) -> Pod:
    (pod,) = [pod for pod in release.cluster.pods.values() if pod.owner is not None and not pod.is_deleted]
    return pod


async def test_probes_go_from_not_ready_to_ready_and_tell_the_stage(release: Release) -> None:
    cluster = release.cluster
    await release.install()
    await cluster.wait_until_rolled_out(180)
    startup = [event.message for event in cluster.happened("Unhealthy") if event.message.startswith("startup")]
    assert any("HTTP 503" in message for message in startup), startup
    assert not [event for event in cluster.happened("Unhealthy") if event.message.startswith("liveness")]
    pod = only_pod(release)
    assert pod.restarts("pagoda") == 0
    (passed,), (ready,) = cluster.happened("StartupPassed", pod.name), cluster.happened("Ready", pod.name)
    assert passed.at <= ready.at
    status, said = await pod.containers["pagoda"].execute("pagoda", "probe", "ready")
    assert (status, said) == (0, "ready: yes: status 200\n")


async def test_every_door_answers_through_the_service(release: Release) -> None:
    async with release.clients() as clients:
        answers = {door: await clients.run(Ask(door, PROMPT, MAX_TOKENS)) for door in DOORS}
    assert {answer.end for answer in answers.values()} == {"finished"}
    assert len({answer.text for door, answer in answers.items() if door != "chat"}) == 1


async def test_the_question_of_helm_test_is_answered(release: Release) -> None:
    assert f"{PROMPT!r} -> " in await release.run_test()


async def test_an_upgrade_under_load_loses_no_request(release: Release) -> None:
    cluster = release.cluster
    asks = [Ask(door, f"{PROMPT}, {door}", MAX_TOKENS) for door in DOORS]
    async with release.clients() as clients:
        expected = {ask: (await clients.run(ask)).text for ask in asks}
    before = only_pod(release)
    async with steady_load(release, expected) as ledger:
        await asyncio.sleep(3)
        await release.install(engine=VALUES["engine"] | {"max_num_seqs": 8})
        await cluster.wait_until_rolled_out(240)
        await asyncio.sleep(3)
    after = only_pod(release)
    assert after.name != before.name
    print(ledger.summary, *ledger.retried, sep="\n")
    assert ledger.lost == []
    assert all(ledger.finished[door] > 3 for door in DOORS), ledger.finished
    (exited,) = cluster.happened("Exited", before.name)
    assert exited.message.startswith("status 0 ")
    assert not cluster.happened("SIGKILL")


async def test_a_pod_that_is_deleted_ends_its_answer_first(release: Release) -> None:
    """Without a second pod: what runs is finished, though nobody can ask any more."""
    cluster, pod = release.cluster, only_pod(release)
    body = {"text_input": PROMPT, "parameters": {"max_tokens": 400, "ignore_eos": True}}
    url = f"http://{pod.address}:8080/v2/models/demo/generate_stream"
    lines: list[str] = []
    async with (
        httpx.AsyncClient(trust_env=False, timeout=120) as client,
        client.stream("POST", url, json=body) as answer,
    ):
        stream = answer.aiter_lines()
        lines.append(await anext(stream))
        deleting = asyncio.create_task(cluster.delete_pod(pod.name))
        async for line in stream:
            lines.append(line)  # noqa: PERF401 (the deletion begins after the first)
    await deleting
    assert '"finish_reason":"length"' in "".join(lines)[-2000:]
    (exited,) = cluster.happened("Exited", pod.name)
    assert exited.message.startswith("status 0 ")
