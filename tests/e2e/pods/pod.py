"""A pod: its containers, run, probed and restarted as a kubelet would."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.pods.container import Container
from tests.e2e.pods.objects import CreateContainerConfigError, Object, expand
from tests.e2e.pods.podman import PodmanError, podman, run
from tests.e2e.pods.probes import Probe
from tests.e2e.pods.volumes import Volumes

if TYPE_CHECKING:
    from tests.e2e.pods.cluster import Cluster

FIRST_BACK_OFF_SECONDS = 10.0
LONGEST_BACK_OFF_SECONDS = 300.0
BACK_OFF_FORGOTTEN_AFTER_SECONDS = 600.0
OTHER_NETWORKS = "k8s.v1.cni.cncf.io/networks"
# What decides where a pod runs, and who it is at the API server: without meaning on one machine.
_IGNORED = {"affinity", "topologySpreadConstraints", "nodeSelector", "tolerations", "priorityClassName"}
_IGNORED |= {"serviceAccountName", "automountServiceAccountToken", "imagePullSecrets", "runtimeClassName", "dnsPolicy"}
_KNOWN = {"containers", "initContainers", "volumes", "securityContext", "terminationGracePeriodSeconds", "subdomain"}
_KNOWN |= {"enableServiceLinks", "restartPolicy", "activeDeadlineSeconds"}  # tests have deadlines of their own


class Pod:
    """A pod of a template. It lives from `run()` to the end of `delete()`, whatever its containers do."""

    def __init__(
        self, cluster: Cluster, name: str, template: Object, owner: Object | None, service: str | None
    ) -> None:
        self.cluster = cluster
        self.name = name
        self.template = template
        self.spec: Object = template["spec"]
        self.labels: dict[str, str] = dict(template["metadata"].get("labels", {}))
        if owner and owner["kind"] == "StatefulSet":
            self.labels["statefulset.kubernetes.io/pod-name"] = name
        self.owner = (owner["kind"], owner["metadata"]["name"]) if owner else None
        self.service = service
        self.image = cluster.image
        self.address = cluster.network.new_address()
        self.podman_name = f"{cluster.namespace}-{name}"
        self.ready_since: float | None = None
        self.withdrawn_at: float | None = None
        self.is_deleted = False
        self.containers: dict[str, Container] = {}
        self._restarts: dict[str, int] = {}
        self._folder = cluster.folder / "pods" / f"{name}@{cluster.next_number()}"
        self.hosts_file = self._folder / "hosts"
        group = self.spec.get("securityContext", {}).get("fsGroup")
        self.volumes = Volumes(cluster.objects, self._folder / "volumes", cluster.claims, group)
        self._phase = ""
        self._running = asyncio.create_task(self._run(), name=f"pod {name}")

    @property
    def is_ready(self) -> bool:
        """As in the pod's condition `Ready`."""
        return self.ready_since is not None

    @property
    def phase(self) -> str:
        """`Succeeded` or `Failed` of a pod whose containers are not restarted; empty while they run."""
        return self._phase

    def restarts(self, container: str) -> int:
        """How often a container was started again."""
        return max(0, self._restarts.get(container, 0) - 1)

    def log(self, container: str) -> str:
        """What all runs of a container have written."""
        files = sorted(self._log_folder.glob(f"{container}-*.log"), key=lambda path: int(path.stem.rpartition("-")[2]))
        lines = "".join(file.read_text(errors="replace") for file in files).splitlines()
        return "\n".join(line.split(" ", 3)[-1] for line in lines)

    def tell(self, container: str, what: str, message: str = "") -> None:
        """Write down an event of this pod."""
        self.cluster.tell(self.name, container, what, message)

    def environment(self, spec: Object) -> dict[str, str]:
        """The environment of a container, without the image's own."""
        if self.spec.get("enableServiceLinks", True):
            raise NotImplementedError("service links in the environment")
        variables = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for variable in spec.get("env", []):
            source = variable.get("valueFrom")
            value = self._from_source(source) if source else expand(str(variable.get("value", "")), variables)
            variables[variable["name"]] = value
        return variables

    async def delete(self, grace_seconds: float | None = None) -> None:
        """Delete the pod: containers get preStop, SIGTERM and the grace period; returns when everything is gone."""
        if not self.is_deleted:
            self.is_deleted = True
            self.tell("", "Deleted")
            self._withdraw()
            grace = self.spec.get("terminationGracePeriodSeconds", 30) if grace_seconds is None else grace_seconds
            containers = list(self.containers.values())
            await asyncio.gather(*(container.end(grace, "the pod is deleted") for container in containers))
            await asyncio.gather(*(container.settled.wait() for container in containers))
            self._running.cancel()
        await asyncio.wait([self._running])

    # ---- from creation to the end

    async def _run(self) -> None:
        try:
            await self._create()
            for spec in self.spec.get("initContainers", []):
                await self._run_container(spec, is_init=True)
            await asyncio.gather(*(self._run_container(spec) for spec in self.spec["containers"]))
            self._phase = self._phase or "Succeeded"
            self.tell("", self._phase)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # a fault of the runner must not look like a pod that is merely not ready
            self.tell("", "RunnerError", repr(error))
            self.cluster.fail(error)
        finally:
            await asyncio.shield(self._remove())

    async def _create(self) -> None:
        unknown = self.spec.keys() - _IGNORED - _KNOWN
        if unknown:
            raise NotImplementedError(f"pod fields {sorted(unknown)}")
        self._log_folder.mkdir(parents=True, exist_ok=True)
        domain = f"{self.cluster.namespace}.svc.cluster.local"
        own = f"{self.name}.{self.service}.{domain} {self.name}" if self.service else self.name
        self.hosts_file.write_text(f"127.0.0.1 localhost\n{self.address} {own}\n")
        others = self.template["metadata"].get("annotations", {}).get(OTHER_NETWORKS)
        async with self.cluster.network.creating:
            networks = await self.cluster.network.attachments(self.address, others.split(",") if others else [])
            share = ("--share", "net,ipc,uts")
            await podman(
                *(
                    "pod",
                    "create",
                    "--name",
                    self.podman_name,
                    "--hostname",
                    self.name,
                    "--no-hosts",
                    *share,
                    *networks,
                ),
                *("--dns", self.cluster.network.gateway),
                *(f"--dns-search={name}" for name in (domain, "svc.cluster.local", "cluster.local")),
                *("--dns-option", "ndots:5"),
            )
        while True:
            try:
                return await self.volumes.create(self.spec.get("volumes", []))
            except CreateContainerConfigError as error:
                self.tell("", "FailedMount", str(error))
                await asyncio.sleep(FIRST_BACK_OFF_SECONDS)

    async def _remove(self) -> None:
        for container in self.containers.values():
            await container.end(0, "the pod ends")
        await run("podman", "pod", "rm", "--force", "--time", "0", self.podman_name)
        await self.volumes.remove()
        self.tell("", "Removed")

    @property
    def _log_folder(self) -> Path:
        return self._folder / "logs"

    async def _run_container(self, spec: Object, *, is_init: bool = False) -> None:
        """Run a container again and again as the restart policy says."""
        policy = self.spec.get("restartPolicy", "Always")
        back_off = 0.0
        for attempt in itertools.count():
            began = time.monotonic()
            status = await self._run_once(spec, attempt, is_init=is_init)
            if self.is_deleted:
                await asyncio.Event().wait()  # until `delete` has ended the other containers too
            if status == 0 and (is_init or policy != "Always"):
                return
            if policy == "Never":
                self._phase = "Failed"
                return
            if time.monotonic() - began > BACK_OFF_FORGOTTEN_AFTER_SECONDS:
                back_off = 0.0
            if back_off:
                self.tell(spec["name"], "BackOff", f"{back_off:g} s")
            await asyncio.sleep(back_off)
            back_off = min(LONGEST_BACK_OFF_SECONDS, max(FIRST_BACK_OFF_SECONDS, 2 * back_off))

    async def _run_once(self, spec: Object, attempt: int, *, is_init: bool) -> int:
        """Start a container and wait for its end; its exit status."""
        name = spec["name"]
        self._restarts[name] = attempt + 1
        try:
            container = await Container.start(self, spec, self._log_folder / f"{name}-{attempt}.log")
        except (CreateContainerConfigError, PodmanError) as error:
            self.tell(name, type(error).__name__, str(error))
            return 1
        self.containers[name] = container
        self.tell(name, "Started", f"restart {attempt}" if attempt else "")
        watcher = asyncio.create_task(self._watch(container)) if not is_init else None
        await container.exited.wait()
        if watcher:
            watcher.cancel()
        self._set_ready(container, False)
        status = await container.exit_status()
        self.tell(name, "Exited", f"status {status} after {time.monotonic() - container.started_at:.1f} s")
        container.settled.set()
        return status

    # ---- probes

    async def _watch(self, container: Container) -> None:
        """Startup probe first; then readiness and liveness side by side."""
        if "startupProbe" in container.spec:
            async for answer in self._probe(container, "startup").verdicts(None):
                if answer.passed:
                    break
                self._kill(container, "startup")
                return
        self.tell(container.name, "StartupPassed")
        await asyncio.gather(self._follow_readiness(container), self._follow_liveness(container))

    async def _follow_readiness(self, container: Container) -> None:
        if "readinessProbe" not in container.spec:
            self._set_ready(container, True)
            return
        async for answer in self._probe(container, "readiness").verdicts(False):
            self._set_ready(container, answer.passed)

    async def _follow_liveness(self, container: Container) -> None:
        if "livenessProbe" in container.spec:
            async for answer in self._probe(container, "liveness").verdicts(True):
                if not answer.passed:
                    self._kill(container, "liveness")
                    return

    def _probe(self, container: Container, kind: str) -> Probe:
        say: Callable[[str], None] = lambda said: self.tell(container.name, "Unhealthy", said)  # noqa: E731
        return Probe(kind, container.spec[f"{kind}Probe"], container.actions, say)

    def _kill(self, container: Container, kind: str) -> None:
        if not self.is_deleted:  # the kubelet asks a pod that is going for its readiness only
            grace = self.spec.get("terminationGracePeriodSeconds", 30)
            grace = container.spec[f"{kind}Probe"].get("terminationGracePeriodSeconds", grace)
            self.cluster.spawn(container.end(grace, f"{kind} probe failed"))

    def _set_ready(self, container: Container, is_ready: bool) -> None:
        if container.is_ready != is_ready:
            container.is_ready = is_ready
            self.tell(container.name, "Ready" if is_ready else "NotReady")
        names = {spec["name"] for spec in self.spec["containers"]}
        all_ready = all(name in self.containers and self.containers[name].is_ready for name in names)
        if all_ready and not self.is_deleted and self.ready_since is None:
            self.ready_since, self.withdrawn_at = time.monotonic(), None
        elif not all_ready:
            self._withdraw()

    def _withdraw(self) -> None:
        if self.ready_since is not None:
            self.ready_since, self.withdrawn_at = None, time.monotonic()

    def _from_source(self, source: Object) -> str:
        if "secretKeyRef" in source:
            return self.cluster.objects.value("Secret", source["secretKeyRef"])
        if "configMapKeyRef" in source:
            return self.cluster.objects.value("ConfigMap", source["configMapKeyRef"])
        path = source["fieldRef"]["fieldPath"]
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str(self.template["metadata"].get(match[1], {}).get(match[2], ""))
        fields = {
            "metadata.name": self.name,
            "metadata.namespace": self.cluster.namespace,
            "status.podIP": self.address,
        }
        return fields[path]
