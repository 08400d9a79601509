"""Deployments and StatefulSets: the pods that there should be, and how new ones take the place of old ones."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.e2e.pods.objects import Object, share

if TYPE_CHECKING:
    from tests.e2e.pods.cluster import Cluster
    from tests.e2e.pods.pod import Pod

SECONDS_BETWEEN_LOOKS = 0.2


def revision(template: Object) -> str:
    """What tells an old pod from a new one."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


class Controller:
    """Makes the pods of one Deployment or StatefulSet what its object says, again and again."""

    def __init__(self, cluster: Cluster, kind: str, name: str) -> None:
        self.cluster = cluster
        self.kind = kind
        self.name = name
        self._numbers = itertools.count(1)
        self._work: Callable[[Object], None] = {"Deployment": self._deployment, "StatefulSet": self._stateful_set}[kind]

    @property
    def object(self) -> Object:
        return self.cluster.objects.get(self.kind, self.name)

    @property
    def replicas(self) -> int:
        return int(self.object["spec"].get("replicas", 1))

    @property
    def pods(self) -> list[Pod]:
        return [pod for pod in self.cluster.pods.values() if pod.owner == (self.kind, self.name)]

    @property
    def is_rolled_out(self) -> bool:
        """Every pod is there, new and available, and no other, as `kubectl rollout status` waits for."""
        current = [pod for pod in self.pods if self._is_new(pod) and self._is_available(pod)]
        return len(self.pods) == len(current) == self.replicas

    async def run(self) -> None:
        while True:
            self._work(self.object["spec"])
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    def _is_new(self, pod: Pod) -> bool:
        return revision(pod.template) == revision(self.object["spec"]["template"])

    def _is_available(self, pod: Pod) -> bool:
        seconds = self.object["spec"].get("minReadySeconds", 0)
        return pod.ready_since is not None and time.monotonic() - pod.ready_since >= seconds

    def _add(self, name: str, spec: Object) -> None:
        self.cluster.add_pod(name, spec["template"], self.object, spec.get("serviceName"))

    def _delete(self, pod: Pod) -> None:
        self.cluster.spawn(self.cluster.delete_pod(pod.name))

    def _deployment(self, spec: Object) -> None:
        """RollingUpdate: never more pods than replicas + maxSurge, nor fewer available ones than replicas - maxUnavailable.

        Pods that are on their way out count as neither.
        """
        rolling = spec["strategy"]["rollingUpdate"]
        surge = share(rolling["maxSurge"], self.replicas, round_up=True)
        fewest = self.replicas - share(rolling["maxUnavailable"], self.replicas, round_up=False)
        alive = [pod for pod in self.pods if not pod.is_deleted]
        new = [pod for pod in alive if self._is_new(pod)]
        old = sorted((pod for pod in alive if not self._is_new(pod)), key=lambda pod: pod.is_ready)
        room = min(self.replicas - len(new), self.replicas + surge - len(alive))
        for _ in range(room):
            self._add(f"{self.name}-{revision(spec['template'])[:8]}-{next(self._numbers):05x}", spec)
        available = sum(self._is_available(pod) for pod in alive)
        for pod in [*old, *new[self.replicas :]]:
            if self._is_available(pod):
                if available <= fewest:
                    continue
                available -= 1
            self._delete(pod)

    def _stateful_set(self, spec: Object) -> None:
        """Ordinals from 0 up, one after the other unless `Parallel`; updates from the last one down, each ready first."""
        pods = {pod.name: pod for pod in self.pods}
        names = [f"{self.name}-{ordinal}" for ordinal in range(self.replicas)]
        for name in names:
            if name not in pods:
                self._add(name, spec)
            is_ready = name in pods and pods[name].is_ready
            if spec.get("podManagementPolicy", "OrderedReady") == "OrderedReady" and not is_ready:
                return
        for name in pods.keys() - set(names):
            if not pods[name].is_deleted:
                self._delete(pods[name])
        strategy = spec.get("updateStrategy", {"type": "RollingUpdate"})
        if strategy["type"] != "RollingUpdate" or not pods.keys() >= set(names):
            return
        first = strategy.get("rollingUpdate", {}).get("partition", 0)
        for name in reversed(names[first:]):
            pod = pods[name]
            if not self._is_new(pod) and not pod.is_deleted:
                self._delete(pod)
                return
            if not self._is_available(pod):
                return
