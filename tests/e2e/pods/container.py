"""One run of one container of a pod: started by podman, watched through its first process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.pods.objects import CreateContainerConfigError, Object, expand, quantity
from tests.e2e.pods.podman import podman, run
from tests.e2e.pods.probes import Actions

if TYPE_CHECKING:
    from tests.e2e.pods.pod import Pod

_IGNORED = {"name", "image", "imagePullPolicy", "ports", "terminationMessagePolicy", "startupProbe", "readinessProbe"}
_IGNORED |= {"livenessProbe", "lifecycle"}  # run by the pod
_KNOWN = {"command", "args", "env", "resources", "securityContext", "volumeMounts", "workingDir"}


class Container:
    """A container that runs. `exited` is set once its first process is gone, `settled` when its status is known too."""

    def __init__(self, pod: Pod, spec: Object, identity: str, process: int) -> None:
        self.pod = pod
        self.spec = spec
        self.name: str = spec["name"]
        self.is_ready = False
        self.started_at = time.monotonic()
        self.exited = asyncio.Event()
        self.settled = asyncio.Event()
        self.actions = Actions(pod.address, spec, self.execute)
        self._identity = identity
        self._process = process
        try:
            if process == 0:
                raise ProcessLookupError
            self._handle = os.pidfd_open(process)
            asyncio.get_running_loop().add_reader(self._handle, self._on_exit)
        except ProcessLookupError:  # it has ended already
            self.exited.set()

    @classmethod
    async def start(cls, pod: Pod, spec: Object, log: Path) -> Container:
        """Start the container. Raises CreateContainerConfigError and PodmanError."""
        name = f"{pod.podman_name}-{spec['name']}"
        words = ["run", "--detach", "--pull=never", "--pod", pod.podman_name, "--name", name, "--replace"]
        words += ["--log-driver=k8s-file", "--log-opt", f"path={log}"]
        identity = (await podman(*words, *_options(pod, spec), *_command(pod, spec))).splitlines()[-1]
        process = int(await podman("container", "inspect", "--format", "{{.State.Pid}}", identity))
        return cls(pod, spec, identity, process)

    async def execute(self, *command: str, timeout: float | None = None) -> tuple[int, str]:
        """Exit status and output of a command in the container; after `timeout` seconds it is killed, with status 137."""
        limit = [] if timeout is None else ["timeout", "--signal=KILL", f"{timeout:g}"]
        return await run("podman", "exec", self._identity, *limit, *command)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the container's first process."""
        if not self.exited.is_set():
            signal.pidfd_send_signal(self._handle, number)

    async def end(self, grace_seconds: float, reason: str) -> None:
        """What the kubelet does: preStop, SIGTERM, SIGKILL when the grace period is over. preStop counts against it."""
        if self.exited.is_set():
            return
        deadline = time.monotonic() + grace_seconds
        self.pod.tell(self.name, "Killing", f"{reason}, grace {grace_seconds:g} s")
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if hook:
            answer = await self.actions.run(hook, grace_seconds)
            self.pod.tell(self.name, "PreStop" if answer.passed else "FailedPreStopHook", answer.said)
        self.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.exited.wait(), max(2.0, deadline - time.monotonic()))
        except TimeoutError:
            self.pod.tell(self.name, "SIGKILL", "the grace period is over")
            self.send_signal(signal.SIGKILL)
            await self.exited.wait()

    async def exit_status(self) -> int:
        """The status of a container that has exited, which is removed."""
        status = int(await podman("wait", self._identity))
        await run("podman", "rm", "--force", self._identity)
        return status

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        os.close(self._handle)
        self.exited.set()


def _command(pod: Pod, spec: Object) -> list[str]:
    """Image and arguments; the entry point goes in front of the image."""
    variables = pod.environment(spec)
    entrypoint = [expand(word, variables) for word in spec.get("command", [])] or pod.image.entrypoint
    words = [f"--entrypoint={json.dumps(entrypoint)}"] if entrypoint else []
    return [*words, pod.image.name, *(expand(word, variables) for word in spec.get("args", []))]


def _options(pod: Pod, spec: Object) -> list[str]:
    unknown = spec.keys() - _IGNORED - _KNOWN
    if unknown:
        raise NotImplementedError(f"container fields {sorted(unknown)}")
    words = [*_security(pod, spec), *_limits(spec), *pod.volumes.arguments(spec.get("volumeMounts", []))]
    words += [f"--volume={pod.hosts_file}:/etc/hosts:ro", *(f"--volume={mount}" for mount in pod.image.mounts)]
    variables = {**pod.image.environment, **pod.environment(spec)}
    words += [f"--env={name}={value}" for name, value in variables.items()]
    if "workingDir" in spec:
        words.append(f"--workdir={spec['workingDir']}")
    return words


def _security(pod: Pod, spec: Object) -> list[str]:
    context = {**pod.spec.get("securityContext", {}), **spec.get("securityContext", {})}
    words = []
    user = pod.image.user
    if "runAsUser" in context:
        user = f"{context['runAsUser']}:{context.get('runAsGroup', 0)}"
    if context.get("runAsNonRoot") and user is not None and user.startswith("0:"):
        raise CreateContainerConfigError("container has runAsNonRoot and would run as root")
    words += [f"--user={user}"] if user else []
    words += [f"--group-add={context['fsGroup']}"] if "fsGroup" in context else []
    if context.get("readOnlyRootFilesystem"):
        words += ["--read-only", "--read-only-tmpfs=false"]
    if context.get("allowPrivilegeEscalation") is False:
        words.append("--security-opt=no-new-privileges")
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        words.append("--security-opt=seccomp=unconfined")
    capabilities = context.get("capabilities", {})
    words += [f"--cap-drop={name}" for name in capabilities.get("drop", [])]
    return words + [f"--cap-add={name}" for name in capabilities.get("add", [])]


def _limits(spec: Object) -> list[str]:
    resources = spec.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    words = []
    if "memory" in limits:
        size = int(quantity(limits["memory"]))
        words += [f"--memory={size}", f"--memory-swap={size}"]
    words += [f"--cpus={quantity(limits['cpu'])}"] if "cpu" in limits else []
    return words + ([f"--cpu-shares={max(2, int(quantity(requests['cpu']) * 1024))}"] if "cpu" in requests else [])
