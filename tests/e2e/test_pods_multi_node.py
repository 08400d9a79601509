"""The rendered release of mode `multiNode`, run as pods from its YAML and nothing else: a model over two pods."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.pods.cluster import Cluster
from tests.e2e.pods.image import pagoda_image, why_not
from tests.e2e.pods.pod import Pod
from tests.e2e.pods.release import Release
from tests.support.load import Ask

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(700),
    pytest.mark.asyncio(loop_scope="module"),
]

SECRET = {"kind": "Secret", "metadata": {"name": "ray"}, "stringData": {"token": "0123456789abcdef" * 4}}
VALUES: dict[str, Any] = {
    "mode": "multiNode",
    "engine": {
        "pipeline_parallel_size": 2,
        "threads": 1,
        "kv_cache_memory_bytes": "64MiB",
        "tokenizer_pool_size": 1,
        "grace_period_seconds": 20,
        "engine_start_timeout_seconds": 600,
    },
    "multiNode": {"networkInterface": "eth0", "ray": {"tokenSecret": {"name": "ray"}}},
    "rollout": {"preStopSeconds": 5, "minReadySeconds": 1},
    "probes": {
        # Two pods and everything else share one machine here; a kubelet's defaults are for nodes with cores to spare.
        "startup": {"periodSeconds": 5, "timeoutSeconds": 20},
        "readiness": {"periodSeconds": 3, "timeoutSeconds": 20},
        "liveness": {"periodSeconds": 20, "timeoutSeconds": 20},
    },
}
HEAD, WORKER = "story-pagoda-head-0", "story-pagoda-worker-0-0"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def release(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    folder: Path = tmp_path_factory.mktemp("multi-node")
    async with Cluster(folder, pagoda_image(folder)) as cluster:
        await cluster.apply([SECRET])
        yield Release(cluster, VALUES)


def pods(release: Release) -> tuple[Pod, Pod]:
    return release.cluster.pods[HEAD], release.cluster.pods[WORKER]


async def answers(release: Release) -> dict[Ask, str]:
    asks = [Ask("generate", "Once upon a time", 24), Ask("grpc", "The old house", 24), Ask("chat", "Who are you?", 24)]
    async with release.clients() as clients:
        return {ask: (await clients.run(ask)).text for ask in asks}


async def test_head_and_worker_find_each_other_and_become_ready_together(release: Release) -> None:
    cluster = release.cluster
    await release.install()
    await cluster.wait_until_rolled_out(600)
    head, worker = pods(release)
    assert {head.restarts("pagoda"), worker.restarts("pagoda")} == {0}
    said = {name: [e.message for e in cluster.happened("Unhealthy", name)] for name in (HEAD, WORKER)}
    assert any("startup: HTTP 503" in message for message in said[HEAD]), said
    assert any("startup: exit" in message for message in said[WORKER]), said
    ready = {name: cluster.happened("Ready", name)[0].at for name in (HEAD, WORKER)}
    started = cluster.happened("StartupPassed", WORKER)[0].at
    assert started < ready[WORKER]  # part of the cluster is not yet a rank that serves
    status, words = await worker.containers["pagoda"].execute("pagoda", "probe", "ready", "--rank")
    assert status == 0
    assert re.search(r"rank \d ready", words), words
