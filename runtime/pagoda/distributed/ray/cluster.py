"""Belonging to a Ray cluster as its driver: found or started, connected to, asked for room. Every wait has a deadline."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.distributed.ray.head import ensure_head
from pagoda.distributed.ray.node import (
    RayNode,
    address_of_cluster,
    ray_environment,
    refusal_in,
    require_ray,
    split_address,
    wait_for_head,
)
from pagoda.errors import CommunicationError, ConfigError, PagodaError
from pagoda.parallel.interfaces import NetworkInterface, choose_interface, choose_outward_interface
from pagoda.parallel.layout import ParallelLayout
from pagoda.process_control import owner_process

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_CALL_SECONDS = 10.0  # of a call to Ray whose answer is not worth more waiting


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A cluster that this process is connected to. `interface`: this machine's, on the way to the head."""

    address: str
    interface: NetworkInterface


def connect_cluster(config: PagodaConfig, deadline: float, on_progress: Callable[[str], None]) -> RayCluster:
    """Connect this process to the cluster at `ray_address`, or to one that is started here.

    `deadline`: `time.monotonic()`.

    Raises:
        ConfigError: Ray is missing or of another version, this machine belongs to no cluster, a token is refused.
        CommunicationError: no answer in time.
    """
    version = require_ray()
    address = config.ray_address
    authentication = (RayAuthentication.of_head if address is None else RayAuthentication.of_member)(os.environ)
    if not authentication.has_token:
        logger.warning("Ray: %s", authentication)
    # Read by Ray as it is imported, and by what it starts.
    os.environ.update(ray_environment(os.environ, authentication))
    if address is None:
        address = ensure_head(
            owner_process(),
            RayNode.of(config),
            lambda: choose_outward_interface(config.network_interface).address,
            deadline,
            on_progress,
        )
    else:
        address = address_of_cluster(address)
        wait_for_head(address, deadline, on_progress)
    on_progress(f"connecting to the Ray cluster at {address}")
    import ray

    if not ray.is_initialized():
        _connect(address, version, deadline)
    address = str(ray.get_runtime_context().gcs_address)
    interface = choose_interface(config.network_interface, split_address(address)[0])
    logger.info("Ray %s at %s; ranks reach the engine over %s", version, address, interface)
    return RayCluster(address, interface)


def reserve(layout: ParallelLayout, device: str, deadline: float, on_progress: Callable[[str], None]) -> PlacementGroup:
    """A placement group for all ranks: a bundle for each pipeline stage, which holds the stage's tensor group.

    A bundle never spans nodes, so a tensor group never does. GPUs are filled node by node. On CPUs each stage has a node of
    its own: what a second node adds is memory bandwidth, of which two stages on one node have no more than one.

    Raises:
        ConfigError: the cluster has no such room by `deadline`; the message says what it has.
    """
    import ray
    from ray.util.placement_group import placement_group

    kind = "GPU" if device == "cuda" else "CPU"
    bundles = [{kind: layout.tensor_parallel_size} for _ in range(layout.pipeline_parallel_size)]
    group = placement_group(bundles, strategy="PACK" if kind == "GPU" else "STRICT_SPREAD")
    # Asked for once: `PlacementGroup.wait` takes half a second for none, and each call of it stays in the head's memory.
    ready = group.ready()
    while not ray.wait([ready], timeout=_LOOK_SECONDS)[0]:
        wanted = _describe_room(layout, kind)
        has = f"the cluster has {_describe_nodes(kind)}"
        if time.monotonic() > deadline:
            release(group)
            raise ConfigError(
                f"the Ray cluster has no room for tensor_parallel_size={layout.tensor_parallel_size}, "
                f"pipeline_parallel_size={layout.pipeline_parallel_size}: needed are {wanted}; {has}. "
                "Let nodes join (pagoda join), free them, or lower one of the two"
            )
        on_progress(f"waiting for room for {wanted}; {has}")
    return group


def bundles_in_order(group: PlacementGroup) -> list[int]:
    """The bundles of `group`, which has its room, in the order in which stages take them: this machine's first.

    Neighbouring stages are on one node where they can be, and ranks that are placed again on the same nodes find their part of
    the checkpoint in the page cache.
    """
    import ray
    from ray.util.placement_group import placement_group_table

    here = ray.get_runtime_context().get_node_id()
    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(node_of, key=lambda bundle: (node_of[bundle] != here, node_of[bundle], bundle))


def release(group: PlacementGroup) -> None:
    """Give room back."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def cluster_nodes() -> list[dict[str, Any]]:
    """The nodes that Ray lists as alive, for messages only: one that has just died is among them for some seconds."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Whether `call` came to an end in time, by an error or not: calls to a head that has died would wait for its restart."""

    def guarded() -> None:
        try:
            call()
        except Exception as error:  # only its end matters: what it leaves behind, the head removes with the job
            logger.debug("a call to Ray failed: %s", error)

    thread = threading.Thread(target=guarded, name="ray-call", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _connect(address: str, version: str, deadline: float) -> None:
    """`ray.init` in a thread of its own: it may wait longer than we do, and must not take over this process's signals."""
    import ray

    # From a thread Ray leaves this process's signals alone, as it should, and warns of that.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            ray.init(address, namespace="pagoda", configure_logging=False, log_to_driver=True)
            outcome.append(None)
        except Exception as error:  # carried to the caller's thread, and raised there as ours
            outcome.append(error)

    thread = threading.Thread(target=connect, name="ray-connect", daemon=True)
    thread.start()
    thread.join(max(_CALL_SECONDS, deadline - time.monotonic()))
    if not outcome:
        raise CommunicationError(f"the Ray head at {address} accepts connections and does not answer")
    if outcome[0] is not None:
        raise _cluster_error(outcome[0], address, version) from outcome[0]


def _cluster_error(error: Exception, address: str, version: str) -> PagodaError:
    text = " ".join(" ".join(str(cause) for cause in _causes(error)).split())
    refusal = refusal_in(text, address, version)
    if refusal is not None:
        return ConfigError(refusal)
    return CommunicationError(f"the Ray cluster at {address} cannot be joined: {text}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it: Ray says why it was refused in the first of them only."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _describe_room(layout: ParallelLayout, kind: str) -> str:
    stages, size = layout.pipeline_parallel_size, layout.tensor_parallel_size
    if stages == 1:
        return f"a node with {size} {kind}"
    return f"{stages} x {size} {kind}, each on one node" if kind == "GPU" else f"{stages} nodes with {size} {kind} each"


def _describe_nodes(kind: str) -> str:
    nodes = cluster_nodes()
    offers = [f"{node['Resources'].get(kind, 0):g} {kind} on {node['NodeManagerHostname']}" for node in nodes]
    return ", ".join(offers) + " (some may be taken)" if offers else "no nodes"
