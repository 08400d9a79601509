"""How a Ray node is started, as head or as worker: one command line and one environment for both. Imports no Ray."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.errors import CommunicationError, ConfigError
from pagoda.parallel.rank_info import installed_version
from pagoda.platform.hardware import cpu_report

HEAD_PORT = 6379
NUM_PORTS = 100

# Ray's object store carries nothing of ours: the least that Ray accepts, so that a small /dev/shm will do.
_OBJECT_STORE_BYTES = 80_000_000

_VERSIONS = re.compile(r"Ray: (\S+) .*?Python: (\d+\.\d+\.\d+)")
_REFUSED = re.compile(r"Unauthenticated|AuthenticationError|[Ii]nvalid or missing authentication token")

_LOOK_SECONDS = 0.5
_CONNECT_SECONDS = 2.0

# Ray by itself notices a dead node after 12 s, a cut network or a dead head after a minute. These bounds hold on a busy
# machine too; ranks have heartbeats of their own, which are faster.
_ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_raylet_liveness_self_check_interval_ms": "2000",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # A rank's memory is settled before it is ready. What else fills the machine is the kernel's and the kubelet's affair.
    "RAY_memory_monitor_refresh_ms": "0",
    # Lines of the ranks in the driver's log come as they are.
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node to be: its address, and the ranks without a GPU that it takes. Port 0: any free one."""

    address: str
    head_port: int | None = None
    head_address: str | None = None
    num_cpus: int = 1
    node_manager_port: int = 0
    object_manager_port: int = 0
    worker_ports: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: PagodaConfig, address: str = "") -> RayNode:
        """This machine as the settings describe it."""
        num_cpus = cpu_report().usable_cores if config.ray_num_cpus is None else config.ray_num_cpus
        first = config.ray_first_port
        if first is None:
            return cls(address=address, num_cpus=num_cpus)
        return cls(
            address=address,
            num_cpus=num_cpus,
            node_manager_port=first,
            object_manager_port=first + 1,
            worker_ports=(first + 2, first + NUM_PORTS - 1),
        )

    def command(self) -> list[str]:
        """The command line: a head at `head_port`, or a worker of the head at `head_address` (HOST:PORT)."""
        words = [sys.executable, "-m", "pagoda.distributed.ray.start", "start", "--block", "--disable-usage-stats"]
        if self.head_port is not None:
            words += ["--head", f"--port={self.head_port}", "--include-dashboard=false", "--no-monitor"]
        else:
            words.append(f"--address={self.head_address}")
        words += [f"--node-ip-address={self.address}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        words += [f"--node-manager-port={self.node_manager_port}", f"--object-manager-port={self.object_manager_port}"]
        if self.worker_ports is not None:
            words += [f"--min-worker-port={self.worker_ports[0]}", f"--max-worker-port={self.worker_ports[1]}"]
        return [*words, f"--num-cpus={self.num_cpus}"]


def ray_environment(environ: Mapping[str, str], authentication: RayAuthentication | None = None) -> dict[str, str]:
    """`environ`, what makes Ray notice losses in time, and the token; what is set there already stays.

    `authentication`: of this machine as a member of a cluster, if None. Raises `ConfigError` for a token that cannot be used.
    """
    authentication = authentication or RayAuthentication.of_member(environ)
    return {**_ENVIRONMENT, **authentication.environment, **environ}


def require_ray() -> str:
    """The version of Ray that is installed here. Raises `ConfigError` if there is none."""
    found = installed_version("ray")
    if found is None:
        raise ConfigError("Ray is not installed here, which several nodes need: pip install ray")
    return found


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT` or `[IPV6]:PORT`; without a port it is Ray's own. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = address, str(HEAD_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address}: must be HOST or HOST:PORT of a Ray head")
    return host, int(port)


def wait_for_head(
    address: str,
    deadline: float,
    on_progress: Callable[[str], None],
    is_told_to_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Wait until something listens at `address`, until `deadline` (seconds of `clock`); False if `is_stopped` before.

    `on_progress` is called with why it is still waiting. That the port is open does not mean that the head is ready.

    Raises:
        CommunicationError: the port was not open in time; the message has the last failure.
    """
    host, port = split_address(address)
    while not is_told_to_stop():
        trouble = trouble_with(host, port)
        if trouble is None:
            return True
        if clock() > deadline:
            raise CommunicationError(f"the Ray head at {host}:{port} cannot be reached: {trouble}")
        on_progress(f"waiting for the Ray head at {host}:{port}: {trouble}")
        time.sleep(_LOOK_SECONDS)
    return False


def address_of_cluster(ray_address: str) -> str:
    """HOST:PORT of the cluster that `ray_address` names: `auto`, or an address. This machine must be a node of it.

    Looked up here because Ray ends the whole process when it connects from a machine that is none.

    Raises:
        ConfigError: this machine belongs to no cluster, or to another one.
    """
    found = _clusters_here()
    wanted = os.environ.get("RAY_ADDRESS", "auto") if ray_address == "auto" else ray_address
    if wanted == "auto":
        if not found:
            raise ConfigError(
                "ray_address=auto: this machine is no node of a Ray cluster; "
                "run `pagoda join HEAD` here first, or leave ray_address out to start a head"
            )
        return found[0]
    for address in found:
        if _resolved(address) == _resolved(wanted):
            return address
    belongs = f"it belongs to {', '.join(found)}" if found else f"run `pagoda join {wanted}` here first"
    raise ConfigError(f"ray_address={wanted}: this machine is no node of that cluster; {belongs}")


def _clusters_here() -> list[str]:
    """Addresses of the clusters whose raylets run here, in this network; then that of the one that was last joined here."""
    network = _network_of("self")
    found = []
    for process in psutil.process_iter(["name", "cmdline", "uids"]):
        if (
            process.info["name"] == "raylet"
            and _is_trusted(process.info["uids"].real)
            and _network_of(str(process.pid)) == network
        ):
            found += [
                word.partition("=")[2] for word in process.info["cmdline"] or () if word.startswith("--gcs-address=")
            ]
    last = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if last.is_file() and _is_trusted(last.stat().st_uid):
        found.append(last.read_text(encoding="utf-8").strip())
    return [address for address in dict.fromkeys(found) if address]


def _is_trusted(user: int) -> bool:
    """Whether this user may say where our cluster is: whoever is believed is sent its token."""
    return user in (0, os.getuid())


def _network_of(process: str) -> str | None:
    """The network namespace of a process; None where it is not known."""
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return None


def _resolved(address: str) -> tuple[frozenset[str], int]:
    host, port = split_address(address)
    try:
        return frozenset(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)), port
    except socket.gaierror:
        return frozenset({host}), port


def refusal_in(text: str, address: str, version: str) -> str | None:
    """Why the cluster at `address` refuses this machine, from Ray's output; None if `text` is about something else.

    `version`: of Ray, here.
    """
    text = " ".join(text.split())
    if "ersion mismatch" in text:
        found = _VERSIONS.search(text)
        theirs = f"Ray {found[1]} with Python {found[2]}" if found else "another version of Ray or Python"
        return (
            f"the Ray cluster at {address} runs {theirs}, and here are Ray {version} with Python {platform.python_version()}: "
            "install the same image on every node"
        )
    if _REFUSED.search(text):
        return (
            f"the Ray cluster at {address} refuses this machine: "
            "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must hold the token of its head"
        )
    return None


def trouble_with(host: str, port: int) -> str | None:
    """Why `host`:`port` cannot be reached, or None if something listens there."""
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except socket.gaierror:
        return f"the name {host} is not known (yet); in Kubernetes it is once the Service exists"
    except ConnectionRefusedError:
        return f"connection refused: nothing listens on port {port} of {host} (yet)"
    except TimeoutError:
        return f"{host} does not answer: another network, a firewall, or a NetworkPolicy"
    except OSError as error:
        return f"{error.strerror or error}"
    return None
