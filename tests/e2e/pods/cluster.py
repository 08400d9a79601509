"""A cluster of one node that runs rendered YAML, and nothing else, as podman pods."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e.pods.controllers import Controller
from tests.e2e.pods.image import Image
from tests.e2e.pods.network import Network
from tests.e2e.pods.objects import Object, Objects
from tests.e2e.pods.pod import Pod

# Their work is done elsewhere than on a node, or is a test's own business.
_WITHOUT_PODS = {"ConfigMap", "Secret", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"}
_numbers = itertools.count(os.getpid() % 200 + 20)


@dataclass(frozen=True)
class Event:
    """Something that happened. `at`: seconds since the cluster's start; `container` is empty for the pod itself."""

    at: float
    pod: str
    container: str
    what: str
    message: str


class Cluster:
    """Use as an async context, which removes every pod, network and address in the end.

    `endpoint_delay`: seconds for which a Service still sends new connections to a pod that is no longer ready.
    """

    def __init__(self, folder: Path, image: Image, *, namespace: str = "tales", endpoint_delay: float = 2.0) -> None:
        number = next(_numbers) % 256
        self.namespace = namespace
        self.folder = folder
        self.image = image
        self.endpoint_delay = endpoint_delay
        self.claims = folder / "claims"
        self.claims.mkdir()
        self.objects = Objects()
        self.network = Network(self, f"pagoda-test-{number}", number)
        self.pods: dict[str, Pod] = {}
        self.events: list[Event] = []
        self._controllers: dict[tuple[str, str], Controller] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pod_numbers = itertools.count(1)
        self._fault: Exception | None = None
        self._began = time.monotonic()

    async def __aenter__(self) -> Cluster:
        await self.network.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pod.delete(grace_seconds=0) for pod in list(self.pods.values())))
        await self.network.close()
        print(self.story())  # pytest shows it with a test that failed

    async def apply(self, documents: Iterable[Object]) -> None:
        """`kubectl apply`: new objects come to life, and changed ones change."""
        documents = list(documents)
        self.objects.apply(documents)
        for document in documents:
            kind, name = document["kind"], document["metadata"]["name"]
            if kind == "Service":
                await self.network.add_service(document)
            elif kind in ("Deployment", "StatefulSet"):
                if (kind, name) not in self._controllers:
                    controller = self._controllers[kind, name] = Controller(self, kind, name)
                    self.spawn(controller.run())
            elif kind == "Pod":
                self.add_pod(name, document, None, None)
            elif kind not in _WITHOUT_PODS:
                raise NotImplementedError(f"objects of kind {kind}")

    def add_pod(self, name: str, template: Object, owner: Object | None, service: str | None) -> None:
        """Make a pod; the controllers do."""
        self.pods[name] = Pod(self, name, template, owner, service)

    async def delete_pod(self, name: str, grace_seconds: float | None = None) -> None:
        """`kubectl delete pod`: returns when it is gone."""
        pod = self.pods[name]
        await pod.delete(grace_seconds)
        if self.pods.get(name) is pod:
            del self.pods[name]

    def next_number(self) -> int:
        """Tells pods of one name apart."""
        return next(self._pod_numbers)

    async def wait_until_rolled_out(self, seconds: float = 300) -> None:
        """`kubectl rollout status` of everything."""
        await self.wait(
            lambda: all(c.is_rolled_out for c in self._controllers.values()), "everything rolled out", seconds
        )

    async def wait(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait until a condition holds; AssertionError with what has happened if it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._fault is not None:
                raise self._fault
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            await asyncio.sleep(0.05)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the cluster does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def fail(self, error: Exception) -> None:
        """A fault of the runner itself: whoever waits is told."""
        self._fault = error

    def now(self) -> float:
        """Seconds since the start, as in events."""
        return time.monotonic() - self._began

    def tell(self, pod: str, container: str, what: str, message: str = "") -> None:
        """Write an event down."""
        self.events.append(Event(self.now(), pod, container, what, " ".join(message.split())))

    def happened(self, what: str, pod: str | None = None, container: str | None = None) -> list[Event]:
        """The events of one kind, in their order."""
        return [
            event
            for event in self.events
            if event.what == what and pod in (None, event.pod) and container in (None, event.container)
        ]

    def story(self) -> str:
        """Events, and the end of each container's log, for a test that fails."""
        lines = [f"{e.at:8.2f} {e.pod:32} {e.container:8} {e.what:14} {e.message}" for e in self.events]
        for log in sorted(self.folder.glob("pods/*/logs/*.log")):
            lines += [f"--- {log.parent.parent.name} {log.stem}", log.read_text(errors="replace")[-4000:]]
        return "\n".join(lines)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, Exception):
            self.fail(error)
