"""What a Ray cluster is made of, and whether its nodes reach each other: for `pagoda doctor --cluster`. Loads no model.

One small actor a node looks at its machine; then all of them meet as the stages of a pipeline would, and try their network.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.cluster import cluster_nodes, connect_cluster
from pagoda.errors import PagodaError
from pagoda.parallel.interfaces import choose_interface, export_interface, host_interfaces, listen_on
from pagoda.parallel.rank_info import RankInfo, find_mismatches, installed_version, python_series

_LOOK_SECONDS = 60.0
_CHECK_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node. `interface`: what its ranks would use, None where that fails; then `problem` is the reason.

    `latency_seconds`, `bytes_per_second`: to the other nodes, and from the one before it; None where not measured.
    """

    host: str
    address: str
    cpus: float
    gpus: float
    interfaces: tuple[str, ...] = ()
    interface: str | None = None
    versions: dict[str, str | None] | None = None
    latency_seconds: float | None = None
    bytes_per_second: float | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterReport:
    """The cluster at `address`, and everything that is wrong with it, a sentence each."""

    address: str
    nodes: tuple[NodeReport, ...]
    problems: tuple[str, ...]


class NodeProbe:
    """The actor on a node. Everything it gives back is plain."""

    def look(self, configured: str | None, route_to: str) -> dict[str, Any]:
        """Interfaces, versions and the interface that a rank here would use."""
        import torch

        found: dict[str, Any] = {
            "host": socket.gethostname(),
            "interfaces": [str(item) for item in host_interfaces()],
            "versions": {
                "pagoda": installed_version("pagoda"),
                "python": python_series(),
                "torch": torch.__version__,
                "ray": installed_version("ray"),
            },
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        try:
            interface = choose_interface(configured, route_to)
        except PagodaError as error:
            return found | {"problem": str(error)}
        export_interface(interface)
        self._listener = listen_on(interface.address)
        port = self._listener.getsockname()[1]
        return found | {"interface": interface.name, "interface_address": interface.address, "port": port}

    def communicate(self, rank: int, size: int, host: str, port: int, timeout_seconds: float) -> dict[str, Any]:
        """Meet the other nodes at `host`:`port` and measure; what is wrong as a sentence under `problem`."""
        import torch

        from pagoda.parallel.groups import connect_groups
        from pagoda.parallel.layout import ParallelLayout
        from pagoda.parallel.preflight import check_communication

        try:
            groups = connect_groups(
                ParallelLayout(1, size),
                rank,
                host=host,
                port=port,
                backend="gloo",
                timeout_seconds=timeout_seconds,
                device=torch.device("cpu"),
                listener=self._listener if rank == 0 else None,
            )
            report = check_communication(groups, torch.device("cpu"))
            groups.close()
        except PagodaError as error:
            return {"problem": str(error)}
        return {} if report.pipeline is None else asdict(report.pipeline)


def check_cluster(config: PagodaConfig, on_progress: Callable[[str], None]) -> ClusterReport:
    """Look at the cluster that `ray_address` names, or that this machine belongs to.

    Raises:
        ConfigError, CommunicationError: there is no cluster to look at.
    """
    config = replace(config, ray_address=config.ray_address or "auto")
    cluster = connect_cluster(config, time.monotonic() + config.rendezvous_timeout_seconds, on_progress)
    route_to = cluster.interface.address
    listed = cluster_nodes()
    on_progress(f"asking {len(listed)} nodes")
    actors = [_actor_on(node) for node in listed]
    looks = _answers([actor.look.remote(config.network_interface, route_to) for actor in actors], _LOOK_SECONDS)
    nodes = [_node(node, look) for node, look in zip(listed, looks, strict=True)]
    problems = [f"{node.host}: {node.problem}" for node in nodes if node.problem]
    problems += find_mismatches([_rank_info(rank, look) for rank, look in enumerate(looks) if "interface" in look])
    if not problems and len(nodes) > 1:
        on_progress("trying the network between the nodes")
        nodes, found = _communicate(nodes, looks, actors)
        problems += found
    return ClusterReport(address=cluster.address, nodes=tuple(nodes), problems=tuple(problems))


def _communicate(
    nodes: list[NodeReport], looks: list[dict[str, Any]], actors: list[Any]
) -> tuple[list[NodeReport], list[str]]:
    """The nodes with what they measured, and what is wrong, the same thing once."""
    first = looks[0]
    calls = [
        actor.communicate.remote(rank, len(actors), first["interface_address"], first["port"], _CHECK_SECONDS / 3)
        for rank, actor in enumerate(actors)
    ]
    answers = _answers(calls, _CHECK_SECONDS)
    measured = [
        replace(
            node,
            latency_seconds=answer.get("latency_seconds"),
            bytes_per_second=answer.get("bytes_per_second"),
            problem=answer.get("problem"),
        )
        for node, answer in zip(nodes, answers, strict=True)
    ]
    return measured, [f"{node.host}: {node.problem}" for node in measured if node.problem]


def _actor_on(node: dict[str, Any]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=place).remote()


def _answers(calls: list[Any], timeout_seconds: float) -> list[dict[str, Any]]:
    """What each call gave; for one that failed or took too long, why, under `problem`."""
    import ray

    done, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_seconds)
    answers: list[dict[str, Any]] = []
    for call in calls:
        if call not in done:
            answers.append({"problem": f"no answer within {timeout_seconds:g} s: is the node still there?"})
            continue
        try:
            answers.append(ray.get(call))
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answers.append({"problem": lines[-1]})
    return answers


def _node(node: dict[str, Any], look: dict[str, Any]) -> NodeReport:
    return NodeReport(
        host=look.get("host", node["NodeManagerHostname"]),
        address=node["NodeManagerAddress"],
        cpus=node["Resources"].get("CPU", 0.0),
        gpus=node["Resources"].get("GPU", 0.0),
        interfaces=tuple(look.get("interfaces", ())),
        interface=look.get("interface"),
        versions=look.get("versions"),
        problem=look.get("problem"),
    )


def _rank_info(rank: int, look: dict[str, Any]) -> RankInfo:
    """What a rank there would say of itself, as far as that is known without a model; what is left out is equal for all."""
    versions = look["versions"]
    return RankInfo(
        rank=rank,
        host=look["host"],
        pid=0,
        pagoda=versions["pagoda"],
        python=versions["python"],
        torch=versions["torch"],
        nccl=None,
        ray=versions["ray"],
        model_hash="",
        configuration_hash="",
        dtype="",
        device=look["device"],
        device_name="",
        memory_bytes=0,
        interface=look["interface"],
        address=look["interface_address"],
    )
