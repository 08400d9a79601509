"""Hosts for tests: network namespaces on a bridge of their own, each with an address, a host name and a Ray directory.

    bridge pg<id> ── veth ── eth0 of namespace <id>a  10.77.<n>.1
                  ── veth ── eth0 of namespace <id>b  10.77.<n>.2

Processes of all nodes see the same files, so one checkout and one checkpoint serve all. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any

_ENTER = 'hostname "$1"; mount --bind "$2" /tmp/ray; shift 2; exec "$@"'
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)


def why_not() -> str | None:
    """Why nodes cannot be made here, for a skip; None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs ip (iproute2) and unshare (util-linux)"
    probe = f"pgprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


class NetworkNode:
    """One host: a network namespace with `eth0` at `address`, and beside it `eth1` at `other_address`, on another network.

    `views`: files or directories that processes started from now on see in another's place (place: what they see there).
    """

    def __init__(self, name: str, address: str, other_address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self.other_address = other_address
        self.directory = directory
        self.views: dict[Path, Path] = {}
        self.processes: list[subprocess.Popen[str]] = []

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` on this node."""
        views = "".join(f"mount --bind {seen} {place}; " for place, seen in self.views.items())
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", views + _ENTER, "sh", self.name]
        return [*enter, str(self.directory / "ray"), *map(str, words)]

    def start(self, *words: str, log: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a process of this node in a session of its own; both its outputs go to the file `log` of the node."""
        with (self.directory / log).open("a") as file:
            process = subprocess.Popen(
                self.command(words),
                env=self._environ(environ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, *words: str, timeout: float = 60.0, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command to its end; its exit status and both outputs."""
        done = subprocess.run(
            self.command(words),
            env=self._environ(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def _environ(self, environ: Mapping[str, str] | None) -> dict[str, str]:
        """Temporary files as on a host of its own; Ray's are in the node's /tmp/ray, for paths of sockets must be short."""
        return {**os.environ, **(environ or {}), "TMPDIR": str(self.directory / "tmp"), "RAY_TMPDIR": "/tmp"}

    def connect(self, port: int, timeout: float = 10.0) -> socket.socket:
        """A connection to a port of this node over its own loopback, whatever becomes of its links."""
        with ThreadPoolExecutor(1) as pool:  # a thread enters the namespace, and nobody else does
            return pool.submit(self._connect_inside, port, timeout).result()

    def _connect_inside(self, port: int, timeout: float) -> socket.socket:
        with Path(f"/run/netns/{self.name}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
        return socket.create_connection(("127.0.0.1", port), timeout)

    def request(self, path: str, body: object = None, *, port: int = 8080, timeout: float = 120.0) -> tuple[int, Any]:
        """Status and JSON of an answer. Raises `OSError` or `http.client.HTTPException` where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = self.connect(port)
        connection.sock.settimeout(timeout)
        with closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def log(self, name: str) -> str:
        """What a log of this node holds by now."""
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    def set_link(self, interface: str, state: str) -> None:
        """Take an interface `down` or `up`; with eth0 the default route goes, and comes back."""
        _ip("-n", self.name, "link", "set", interface, state)
        if (interface, state) == ("eth0", "up"):
            self.set_default_route()

    def set_default_route(self) -> None:
        """As in a pod: a default route over eth0, here one that leads nowhere."""
        _ip("-n", self.name, "route", "replace", "default", "via", self.address.rpartition(".")[0] + ".254")

    def bytes_on(self, interface: str) -> int:
        """Bytes that an interface has sent and received since it was made."""
        words = ["ip", "netns", "exec", self.name, "cat", f"/sys/class/net/{interface}/statistics/tx_bytes"]
        words.append(f"/sys/class/net/{interface}/statistics/rx_bytes")
        counters = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return sum(map(int, counters.split()))

    def pids(self) -> list[int]:
        """Every process in this node's namespace."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in listed.split()]

    def pids_of(self, *words: str) -> list[int]:
        """Processes of this node whose command line holds all `words`."""
        return [pid for pid in self.pids() if all(word in _command_line(pid) for word in words)]


class NetworkNodes:
    """Several nodes on one bridge, as a context: what was made and started is gone at its end."""

    def __init__(self, count: int, directory: Path, number: int) -> None:
        """`number`: 0 to 254, tells the networks of tests that run at the same time apart."""
        self._prefix = f"pg{os.getpid() % 100000}n{number}"
        self._bridges = [f"{self._prefix}br{index}" for index in range(2)]
        self.nodes = []
        for index in range(count):
            name = f"{self._prefix}{'abcdefgh'[index]}"
            home = directory / name
            for folder in ("ray", "tmp"):
                (home / folder).mkdir(parents=True)
            self.nodes.append(NetworkNode(name, f"10.77.{number}.{index + 1}", f"10.78.{number}.{index + 1}", home))

    def __enter__(self) -> NetworkNodes:
        Path("/tmp/ray").mkdir(exist_ok=True)
        with ExitStack() as undo:
            for bridge in self._bridges:
                _ip("link", "add", bridge, "type", "bridge")
                undo.callback(_ip, "link", "delete", bridge)
                _ip("link", "set", bridge, "up")
            for node in self.nodes:
                self._make(node, undo)
            undo.callback(self._end_processes)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _make(self, node: NetworkNode, undo: ExitStack) -> None:
        etc = Path("/etc/netns") / node.name
        etc.mkdir(parents=True)
        undo.callback(shutil.rmtree, etc)
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody answers: an unknown name is so at once
        hosts = [f"{other.address} {other.name}" for other in self.nodes]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        _ip("netns", "add", node.name)
        undo.callback(_ip, "netns", "delete", node.name)
        _ip("-n", node.name, "link", "set", "lo", "up")
        for index, address in enumerate((node.address, node.other_address)):
            outside = f"{node.name}{index}"
            _ip("link", "add", outside, "type", "veth", "peer", "name", f"eth{index}", "netns", node.name)
            _ip("link", "set", outside, "master", self._bridges[index], "up")
            _ip("-n", node.name, "address", "add", f"{address}/24", "dev", f"eth{index}")
            _ip("-n", node.name, "link", "set", f"eth{index}", "up")
        node.set_default_route()

    def _end_processes(self, patience: float = 10.0) -> None:
        """End what was started, wait for every process of the nodes, and kill what remains."""
        started = [process for node in self.nodes for process in node.processes]
        for process in started:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + patience
        while any(node.pids() for node in self.nodes):
            for process in started:
                process.poll()
            if time.monotonic() > deadline:
                for pid in (pid for node in self.nodes for pid in node.pids()):
                    _kill(pid)
            time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
