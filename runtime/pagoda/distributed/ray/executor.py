"""Several ranks on several machines: actors of a Ray cluster, which connect back to this process over TCP.

    connect to the cluster ──▶ reserve room ──▶ an actor a rank ──▶ each connects back, with a handshake ──▶ `RankGroup`

Ray places and starts ranks and notices their end. Plans, results and heartbeats go over the connections, the model's traffic
over torch.distributed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.rank_group import RankGroup
from pagoda.distributed.rank_launcher import RankConnection, RankLauncher
from pagoda.distributed.ray.actor import PagodaRank
from pagoda.distributed.ray.cluster import RayCluster, bundles_in_order, connect_cluster, release, reserve, within
from pagoda.distributed.ray.listener import ConnectedRank, RankListener
from pagoda.errors import CommunicationError, PagodaError
from pagoda.models.config import ModelConfig
from pagoda.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)

_DEATH_SECONDS = 1.0  # from the end of a dying rank's connection until Ray knows
_CALL_SECONDS = 3.0


def ray_executor(config: PagodaConfig, model_config: ModelConfig) -> RankGroup:
    """The executor of ranks on a Ray cluster."""
    return RankGroup(config, model_config, RayLauncher(config))


class _RankEndedError(Exception):
    """A rank ended before it connected, for a reason that may pass: its node died."""


class RayLauncher(RankLauncher):
    """Ranks as actors of a Ray cluster."""

    uses_ray = True

    def __init__(self, config: PagodaConfig) -> None:
        self._config = config
        self._layout = ParallelLayout(
            config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel
        )
        self._room: PlacementGroup | None = None
        self._actors: list[ActorHandle] = []
        self._served: list[ObjectRef[int]] = []

    @override
    def launch(
        self, num_ranks: int, timeout_seconds: float, on_progress: Callable[[str], None]
    ) -> list[RankConnection]:
        deadline = time.monotonic() + timeout_seconds
        cluster = connect_cluster(self._config, deadline, on_progress)
        while True:
            try:
                return self._try_launch(cluster, num_ranks, deadline, on_progress)
            except _RankEndedError as error:
                # Ray gives room on a node that has just died until it has noticed.
                logger.warning("%s; placing the ranks again", error)
                self.terminate(0.0)
                if time.monotonic() > deadline:
                    raise CommunicationError(f"{error}, and there was no time to place the ranks again") from error

    def _try_launch(
        self, cluster: RayCluster, num_ranks: int, deadline: float, on_progress: Callable[[str], None]
    ) -> list[RankConnection]:
        self._room = room = reserve(self._layout, self._config.device, deadline, on_progress)
        with RankListener(cluster.interface.address, num_ranks) as listener:
            self._start_actors(num_ranks, room, listener)

            def look(missing: list[int]) -> None:
                self._raise_for_ended(missing)
                on_progress(f"{num_ranks - len(missing)} of {num_ranks} ranks are connected")

            connected = listener.accept_all(deadline, look)
        hosts = _names(connected)
        logger.info("ranks: %s", ", ".join(f"{rank} on {host}" for rank, host in enumerate(hosts)))
        return [
            # Ray shows an actor its own GPU and no other.
            RankConnection(item.socket, host, listener.address, device_index=0)
            for item, host in zip(connected, hosts, strict=True)
        ]

    def _start_actors(self, num_ranks: int, room: PlacementGroup, listener: RankListener) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        is_cuda = self._config.device == "cuda"
        actor = ray.remote(PagodaRank)
        bundles = bundles_in_order(room)
        for rank in range(num_ranks):
            place = PlacementGroupSchedulingStrategy(
                room, placement_group_bundle_index=bundles[self._layout.coordinates(rank).pipeline_stage]
            )
            handle = actor.options(
                num_cpus=0 if is_cuda else 1, num_gpus=1 if is_cuda else 0, scheduling_strategy=place, max_restarts=0
            ).remote()
            self._actors.append(handle)
            self._served.append(handle.serve.remote(rank, listener.address, listener.port, listener.secret))

    def _raise_for_ended(self, missing: list[int]) -> None:
        """Raise for a rank that will not come any more."""
        for rank in missing:
            error = self._end_of(rank, 0.0)
            if error is None:
                continue
            from ray.exceptions import RayTaskError

            cause = getattr(error, "cause", None)
            if isinstance(cause, PagodaError):
                raise cause
            if isinstance(error, RayTaskError):
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise CommunicationError(f"rank {rank} could not be started: {lines[-1].strip()}")
            raise _RankEndedError(f"rank {rank} {_describe_end(error)} before it connected")

    def _end_of(self, rank: int, timeout_seconds: float) -> BaseException | None:
        """Why the actor's one call ended, or None while it has not."""
        import ray

        done, _ = ray.wait([self._served[rank]], timeout=timeout_seconds)
        if not done:
            return None
        try:
            ray.get(done[0], timeout=_CALL_SECONDS)
        except Exception as error:  # of whatever type: it is the answer
            return error
        return None

    @override
    def death_of(self, rank: int) -> str | None:
        if rank >= len(self._served):
            return None
        found: list[BaseException | None] = []
        within(_CALL_SECONDS, lambda: found.append(self._end_of(rank, _DEATH_SECONDS)))
        error = found[0] if found else None
        return None if error is None else _describe_end(error)

    @override
    def terminate(self, patience_seconds: float) -> None:
        actors, served, room = self._actors, self._served, self._room
        self._actors, self._served, self._room = [], [], None

        def end() -> None:
            import ray

            if served and patience_seconds > 0:
                ray.wait(served, num_returns=len(served), timeout=patience_seconds)
            for actor in actors:
                ray.kill(actor)
            if room is not None:
                release(room)

        if (actors or room is not None) and not within(patience_seconds + _CALL_SECONDS, end):
            logger.warning(
                "timeout while ending the ranks: the Ray head does not answer; it ends them when this process exits"
            )


def _names(connected: list[ConnectedRank]) -> list[str]:
    """A name for each rank's host that no other host has."""
    hosts = {(item.host, item.address) for item in connected}
    count = Counter(host for host, _ in hosts)
    return [item.host if count[item.host] == 1 else f"{item.host} ({item.address})" for item in connected]


def _describe_end(error: Any) -> str:
    """How a rank ended, from Ray's exception for it."""
    text = " ".join(str(error).split())
    if "node" in text and ("died" in text or "dead" in text) and "health check" in text:
        return "ended with its node, which Ray reports dead (no heartbeat of the node)"
    if "SIGKILL" in text or "connection error code 2" in text:
        return "was killed by SIGKILL (OOM killer or operator)"
    return f"ended: {text.split(' class_name:')[0]}"
