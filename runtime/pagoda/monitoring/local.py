"""What this machine says of a server on it: processes, ports, the container's limits, network interfaces.

Other users' processes show less, and another network namespace nothing: what is not seen is left out.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pagoda.platform.cgroup import memory_left, memory_limit

CORE_MODULE = "pagoda.engine.core.process"
RANK_MODULE = "pagoda.distributed.rank_process"
_PROGRAMS = frozenset({"pagoda", "vllm"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", ""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process of a server. `role`: server, engine core or rank. `status`: psutil's; "stopped" after SIGSTOP."""

    pid: int
    role: str
    status: str
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFacts:
    """`processes` of the server that was asked, where it is known which, else of all servers here.

    `listener`: the process that listens on the port that was asked. Bytes: `memory_limit` and `memory_left` of the container.
    `oom_kills`: since the container began. `load`: threads that could run, in the last minute; `cores`: of the machine.
    `interfaces_down`: network interfaces that are not up; `interface_errors`: of others, packets lost or wrong.
    """

    processes: list[Process] = field(default_factory=list)
    listener: Process | None = None
    memory_limit: int | None = None
    memory_left: int | None = None
    oom_kills: int = 0
    load: float = 0.0
    cores: int = 1
    interfaces_down: list[str] = field(default_factory=list)
    interface_errors: dict[str, int] = field(default_factory=dict)


def is_local(url: str) -> bool:
    """Whether a server at `url` is on this machine."""
    return (urlsplit(url).hostname or "") in _LOOPBACK


def local_facts(url: str) -> LocalFacts:
    """What is known here of the server at `url`, and of this machine."""
    split = urlsplit(url)
    port = split.port or (443 if split.scheme == "https" else 80)
    ports = _listening_ports()
    found: list[Process] = []
    listener: Process | None = None
    own: list[Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            listens = ports.get(process.pid, ())
            is_server = _is_server(process.cmdline())
            if not is_server and port not in listens:
                continue
            role = "server" if is_server else process.name()
            this = Process(pid=process.pid, role=role, status=process.status(), ports=listens)
            family = [this, *_children(process)]
            found += family if is_server else []
            if port in listens:
                listener, own = this, family
    groups = list(Path("/sys/fs/cgroup").glob("memory.events"))
    stats = psutil.net_if_stats()
    counters = psutil.net_io_counters(pernic=True)
    return LocalFacts(
        processes=own or found,
        listener=listener,
        memory_limit=memory_limit(),
        memory_left=memory_left(),
        oom_kills=sum(_counted(group, "oom_kill") for group in groups),
        load=os.getloadavg()[0],
        cores=os.cpu_count() or 1,
        interfaces_down=sorted(name for name, one in stats.items() if not one.isup),
        interface_errors={
            name: lost
            for name, one in counters.items()
            if (lost := one.errin + one.errout + one.dropout) and name != "lo"
        },
    )


def _is_server(command: list[str]) -> bool:
    names = [Path(word).name for word in command[:3]]
    is_ours = any(name in _PROGRAMS for name in names) or "pagoda.cli.main" in command[:4]
    return is_ours and "serve" in command[:6]


def _children(process: psutil.Process) -> list[Process]:
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            command = child.cmdline()
            role = "engine core" if CORE_MODULE in command else "rank" if RANK_MODULE in command else ""
            if role:
                found.append(Process(pid=child.pid, role=role, status=child.status()))
    return found


def _listening_ports() -> dict[int, tuple[int, ...]]:
    """TCP ports by the process that listens on them."""
    found: dict[int, tuple[int, ...]] = {}
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid is not None and connection.laddr:
                found[connection.pid] = (*found.get(connection.pid, ()), connection.laddr.port)
    return found


def _counted(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
