"""The pod runner itself: it must be as strict as a kubelet, or what the other tests show means little."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.pods.cluster import Cluster
from tests.e2e.pods.image import pagoda_image, why_not

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(120),
]

# Answers with its name. Ready and live while no file /tmp/unready, /tmp/dead is there; on SIGTERM it ends at once.
SERVER = """
import http.server, os, pathlib, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
time.sleep(float(os.environ.get("START_SECONDS", "0")))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fault = {"/ready": "/tmp/unready", "/live": "/tmp/dead"}.get(self.path)
        self.send_response(503 if fault and pathlib.Path(fault).exists() else 200)
        self.end_headers()
        self.wfile.write((os.environ.get("VERSION", "") + " " + socket.gethostname()).encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""
POD: dict[str, Any] = {
    "enableServiceLinks": False,
    "terminationGracePeriodSeconds": 5,
    "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
    "containers": [
        {
            "name": "server",
            "command": ["python3", "-c", SERVER],
            "env": [{"name": "VERSION", "value": "one"}],
            "ports": [{"name": "http", "containerPort": 8000}],
            "readinessProbe": {
                "httpGet": {"path": "/ready", "port": "http"},
                "periodSeconds": 1,
                "failureThreshold": 2,
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
}


def container(**changes: Any) -> dict[str, Any]:
    """The pod with a changed container."""
    pod = copy.deepcopy(POD)
    pod["containers"][0].update(changes)
    return pod


def workload(kind: str, spec: dict[str, Any], replicas: int = 1, **settings: Any) -> dict[str, Any]:
    """A Deployment or StatefulSet named `web`."""
    template = {"metadata": {"labels": {"app": "web"}}, "spec": spec}
    return {"kind": kind, "metadata": {"name": "web"}, "spec": {"replicas": replicas, "template": template, **settings}}


def service(**settings: Any) -> dict[str, Any]:
    """The Service in front of it."""
    ports = [{"port": 80, "targetPort": "http"}]
    return {
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": ports, **settings},
    }


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path, pagoda_image(tmp_path), endpoint_delay=0.0) as running:
        yield running


async def test_a_pod_is_ready_and_not_ready_after_as_many_probes_as_it_says(cluster: Cluster) -> None:
    await cluster.apply([service(), workload("StatefulSet", POD, serviceName="web")])
    await cluster.wait(lambda: "web-0" in cluster.pods and cluster.pods["web-0"].is_ready, "ready")
    running = cluster.pods["web-0"].containers["server"]
    assert await running.execute("sh", "-c", "id -u; touch /tmp/unready; touch /x") == (
        1,
        "10001\ntouch: cannot touch '/x': Permission denied\n",
    )
    await cluster.wait(lambda: not cluster.pods["web-0"].is_ready, "not ready")
    assert len(cluster.happened("Unhealthy", "web-0")) >= 2
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError):  # no endpoints
            await client.get(f"http://{cluster.network.service_address('web')}")
        await running.execute("rm", "/tmp/unready")
        await cluster.wait(lambda: cluster.pods["web-0"].is_ready, "ready again")
        assert (await client.get(f"http://{cluster.network.service_address('web')}")).text == "one web-0"
    assert running.pod.restarts("server") == 0


async def test_names_of_a_headless_service_are_known_before_pods_are_ready_if_it_says_so(cluster: Cluster) -> None:
    documents = [service(clusterIP="None"), workload("StatefulSet", container(), serviceName="web")]
    documents[1]["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "START_SECONDS", "value": "300"}]
    await cluster.apply(documents)
    await cluster.wait(lambda: cluster.happened("StartupPassed"), "started")
    script = "import socket; print(socket.gethostbyname('web-0.web'))"

    async def looked_up() -> str:
        return (await cluster.pods["web-0"].containers["server"].execute("python3", "-c", script))[1].strip()

    assert "Name or service not known" in await looked_up()
    await cluster.apply([service(clusterIP="None", publishNotReadyAddresses=True)])
    assert await looked_up() == cluster.pods["web-0"].address


async def test_liveness_restarts_a_container_and_startup_holds_it_back(cluster: Cluster) -> None:
    probe = {"httpGet": {"path": "/live", "port": 8000}, "periodSeconds": 1, "failureThreshold": 2}
    slow = container(livenessProbe=probe, startupProbe={**probe, "failureThreshold": 30})
    slow["containers"][0]["env"] = [{"name": "START_SECONDS", "value": "4"}]
    await cluster.apply([workload("StatefulSet", slow, serviceName="web")])
    await cluster.wait(lambda: cluster.pods and cluster.pods["web-0"].is_ready, "ready")
    assert cluster.pods["web-0"].restarts("server") == 0
    assert len(cluster.happened("Unhealthy", "web-0")) >= 3  # more than liveness alone would have borne
    await cluster.pods["web-0"].containers["server"].execute("touch", "/tmp/dead")
    await cluster.wait(lambda: cluster.pods["web-0"].restarts("server") == 1, "restarted")
    assert "liveness probe failed" in cluster.happened("Killing")[0].message


async def test_a_pod_that_goes_runs_its_hook_then_gets_sigterm_and_sigkill_when_its_time_is_over(
    cluster: Cluster,
) -> None:
    hook = {"preStop": {"exec": {"command": ["sleep", "2"]}}}
    deaf = container(lifecycle=hook, command=["sh", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"])
    del deaf["containers"][0]["readinessProbe"]
    await cluster.apply([workload("StatefulSet", deaf, serviceName="web", replicas=1)])
    await cluster.wait(lambda: cluster.pods and cluster.pods["web-0"].is_ready, "ready")
    pod = cluster.pods["web-0"]
    deleting = asyncio.create_task(cluster.delete_pod("web-0"))
    await cluster.wait(lambda: cluster.happened("SIGKILL", "web-0"), "killed", 30)
    await deleting
    what = {event.what: event.at for event in cluster.events if event.pod == "web-0"}
    assert what["PreStop"] - what["Killing"] > 1.9
    assert what["SIGKILL"] - what["Killing"] > 4.9
    await cluster.wait(lambda: cluster.pods.get("web-0") not in (None, pod), "a new pod of the same name")


async def test_a_deployment_is_replaced_without_ever_having_fewer_pods_or_more_than_it_may(cluster: Cluster) -> None:
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    await cluster.apply([service(), workload("Deployment", POD, replicas=2, strategy=rolling)])
    await cluster.wait_until_rolled_out()
    fewest, most = 9, 0

    async def watch() -> None:
        nonlocal fewest, most
        while True:
            alive = [pod for pod in cluster.pods.values() if not pod.is_deleted]
            fewest, most = min(fewest, sum(pod.is_ready for pod in alive)), max(most, len(alive))
            await asyncio.sleep(0.02)

    watcher = asyncio.create_task(watch())
    two = container(env=[{"name": "VERSION", "value": "two"}])
    await cluster.apply([workload("Deployment", two, replicas=2, strategy=rolling)])
    await cluster.wait_until_rolled_out()
    watcher.cancel()
    assert (fewest, most) == (2, 3)
    async with httpx.AsyncClient(trust_env=False) as client:
        answers = {(await client.get(f"http://{cluster.network.service_address('web')}")).text for _ in range(4)}
    assert {answer.split()[0] for answer in answers} == {"two"}


async def test_a_stateful_set_is_updated_from_its_last_pod_down_to_the_partition(cluster: Cluster) -> None:
    parallel = {"serviceName": "web", "podManagementPolicy": "Parallel"}
    await cluster.apply([workload("StatefulSet", POD, replicas=3, **parallel)])
    await cluster.wait_until_rolled_out()
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"partition": 1}}
    two = container(env=[{"name": "VERSION", "value": "two"}])
    await cluster.apply([workload("StatefulSet", two, replicas=3, updateStrategy=strategy, **parallel)])
    await cluster.wait(lambda: len(cluster.happened("Deleted")) == 2, "two pods replaced")
    await cluster.wait(lambda: sum(pod.is_ready for pod in cluster.pods.values()) == 3, "all back")
    assert [event.pod for event in cluster.happened("Deleted")] == ["web-2", "web-1"]


async def test_what_the_runner_cannot_do_is_said(cluster: Cluster) -> None:
    await cluster.apply([workload("StatefulSet", {**POD, "hostNetwork": True}, serviceName="web")])
    with pytest.raises(NotImplementedError, match="hostNetwork"):
        await cluster.wait(lambda: False, "the impossible", 10)
