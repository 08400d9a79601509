"""The rendered release of mode `multiNode`, run as pods from its YAML and nothing else: a model over two pods."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.pods.cluster import Cluster
from tests.e2e.pods.image import pagoda_image, why_not
from tests.e2e.pods.pod import Pod
from tests.e2e.pods.release import Release
from tests.support.kserve_objects import REPOSITORY
from tests.support.load import Ask, Clients
from tests.support.server import ServerProcess

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
        "cpu_kernels": "reference",  # the same in every pod and in the process that is compared
    },
    # A second network, which is no pod's route to anywhere: what is seen on it was sent over the interface that is named.
    "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "ranks"},
    "multiNode": {"networkInterface": "net1", "ray": {"tokenSecret": {"name": "ray"}}},
    "rollout": {"preStopSeconds": 5, "minReadySeconds": 1},
    "probes": {
        # Two pods and everything else share one machine here; a kubelet's defaults are for nodes with cores to spare.
        "startup": {"periodSeconds": 5, "timeoutSeconds": 20},
        # A group may be back within the two periods in a row that the chart waits for by default.
        "readiness": {"periodSeconds": 2, "timeoutSeconds": 20, "failureThreshold": 1},
        "liveness": {"periodSeconds": 20, "timeoutSeconds": 20},
    },
}
HEAD, WORKER = "story-pagoda-head-0", "story-pagoda-worker-0-0"


# Every TCP socket in the pod: whose it is, where it listens, or the two ends of a connection; and the address of net1.
SOCKETS = """
import json, psutil
def one(s):
    name = psutil.Process(s.pid).name() if s.pid else ""
    to = s.raddr.ip.removeprefix("::ffff:") if s.raddr else ""
    return {"name": name, "at": s.laddr.ip.removeprefix("::ffff:"), "port": s.laddr.port, "to": to}
sockets = [one(s) for s in psutil.net_connections("tcp") if s.status in ("LISTEN", "ESTABLISHED")]
(net1,) = [a.address for a in psutil.net_if_addrs()["net1"] if a.family.name == "AF_INET"]
print(json.dumps({"net1": net1, "sockets": sockets}))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def release(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    folder: Path = tmp_path_factory.mktemp("multi-node")
    async with Cluster(folder, pagoda_image(folder)) as cluster:
        await cluster.apply([SECRET])
        yield Release(cluster, VALUES)


def pods(release: Release) -> tuple[Pod, Pod]:
    return release.cluster.pods[HEAD], release.cluster.pods[WORKER]


ASKS = [Ask("generate", "Once upon a time", 24), Ask("grpc", "The old house", 24), Ask("chat", "Who are you?", 24)]


async def answers(clients: Clients) -> dict[Ask, str]:
    async with clients:
        given = {ask: await clients.run(ask) for ask in ASKS}
    assert {answer.end for answer in given.values()} == {"finished"}, given
    return {ask: answer.text for ask, answer in given.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected() -> dict[Ask, str]:
    """What the same model says in one process."""
    with ServerProcess(model=REPOSITORY / "runtime/pagoda/demo_model", cpu_kernels="reference") as server:
        server.wait_until_ready()
        return await answers(Clients(server))


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


async def test_answers_are_those_of_one_process(release: Release, expected: dict[Ask, str]) -> None:
    assert await answers(release.clients()) == expected
    assert "Once upon a time" in await release.run_test()


async def test_ranks_talk_over_the_named_interface_and_ray_on_its_pinned_ports(release: Release) -> None:
    seen = []
    for pod in pods(release):
        status, said = await pod.containers["pagoda"].execute("python3", "-c", SOCKETS)
        assert status == 0, said
        seen.append(json.loads(said))
    networks = {pod["net1"] for pod in seen}
    for pod in seen:
        (other,) = networks - {pod["net1"]}
        between = [socket for socket in pod["sockets"] if socket["to"] == other]
        assert len(between) >= 2, pod  # the driver's connection to a rank, and the ranks' own
        assert {socket["at"] for socket in between} == {pod["net1"]}
        listening = [socket for socket in pod["sockets"] if not socket["to"]]
        ports = {socket["port"] for socket in listening if socket["name"] in ("raylet", "gcs_server")}
        assert ports
        assert ports <= {6379, *range(6380, 6480)}, listening


async def test_a_killed_worker_makes_the_head_unready_and_the_group_comes_back(
    release: Release, expected: dict[Ask, str]
) -> None:
    cluster = release.cluster
    head, worker = pods(release)
    killed_at = cluster.now()
    worker.containers["pagoda"].send_signal(signal.SIGKILL)
    await cluster.wait(lambda: not head.is_ready, "the head is not ready", 60)
    await cluster.wait(lambda: head.is_ready and worker.is_ready, "the group is back", 500)
    unready, ready = (
        next(event.at - killed_at for event in cluster.happened(what, HEAD) if event.at > killed_at)
        for what in ("NotReady", "Ready")
    )
    print(f"head not ready after {unready:.1f} s, ready again after {ready:.1f} s")
    assert (worker.restarts("pagoda"), head.restarts("pagoda")) == (1, 0)  # the head's container lives on
    assert await answers(release.clients()) == expected


async def test_changed_settings_replace_the_head_and_leave_its_workers_be(
    release: Release, expected: dict[Ask, str]
) -> None:
    cluster = release.cluster
    head, worker = pods(release)
    await release.install(engine=VALUES["engine"] | {"max_num_seqs": 8})
    await cluster.wait(lambda: head.is_deleted, "the old head goes", 30)
    await cluster.wait_until_rolled_out(600)
    assert pods(release)[0] is not head
    assert pods(release)[1] is worker
    assert worker.restarts("pagoda") == 1
    (*_, exited) = cluster.happened("Exited", HEAD)
    assert exited.message.startswith("status 0 ")
    assert await answers(release.clients()) == expected
