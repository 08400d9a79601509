"""How long `pagoda serve` takes until it is ready, and the most memory that its processes had until then.

    python benchmarks/start_up.py MODEL [--repeat 3] [--wake] [--restart] [OPTIONS OF pagoda serve]

Prints, for each run, seconds from process start to /v2/health/ready, those of the engine's stages, what the weights take as
they are kept, and the peak of each process's resident memory (VmHWM). With --wake also how long /wake_up takes after a /sleep,
with --restart how long the server is not ready after its engine was killed, with a spare process there. The processor time
of the engine's process, which tells more than the clock where others use the machine, is given beside each.

With `weight_cache_dir=auto`, the default, a start leaves packed weights for later ones to map, some seconds after it is
ready: `--write-cache` starts once before the others and waits for that. Without bytecode of Pagoda's modules
(PYTHONDONTWRITEBYTECODE on a fresh tree) each start compiles them, half a second more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

MIB = 2**20
TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.02  # an answer takes the server a few milliseconds, which its start is then without
STAGES = re.compile(r"engine ready after (.*)")
CACHED = re.compile(r"packed weights .*(the next start maps|not cached)|weights are mapped from")
WEIGHTS = re.compile(r"weights take (.*)")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--write-cache", action="store_true")
    parser.add_argument("--wake", action="store_true")
    parser.add_argument("--restart", action="store_true")
    own, settings = parser.parse_known_args()
    if own.write_cache:
        write_cache(own, settings)
    runs = [start_once(own, settings) for _ in range(own.repeat)]
    for run in runs:
        print(json.dumps(run))
    print(f"median: ready after {statistics.median(run['ready_seconds'] for run in runs):.2f} s")


def command_of(own: argparse.Namespace, settings: list[str]) -> tuple[list[str], str]:
    """A server's command line and its URL."""
    http_port, grpc_port = free_ports(2)
    command = [str(Path(sys.executable).with_name("pagoda")), "serve", "--model", str(own.model), *settings]
    if own.restart:
        command += ["--spare-process-seconds", "0"]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--host", "127.0.0.1"]
    return command, f"http://127.0.0.1:{http_port}"


def write_cache(own: argparse.Namespace, settings: list[str]) -> None:
    """Start once until the engine says what has become of its packed weights."""
    command, _ = command_of(own, settings)
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not CACHED.search(Path(log.name).read_text()):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server ended, or did not say anything about packed weights")
                time.sleep(0.2)
        finally:
            server.terminate()
            server.wait()


def start_once(own: argparse.Namespace, settings: list[str]) -> dict[str, object]:
    """One server from its start to ready, what else is asked for, and its end."""
    command, url = command_of(own, settings)
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until_ready(server, url)
            seconds = {"ready_seconds": time.monotonic() - started}
            peaks = {name_of(pid): peak_bytes(pid) for pid in tree_of(server.pid)}
            core = cores_of(server.pid)[0]
            seconds["ready_core_cpu_seconds"] = cpu_seconds(core)
            if own.wake:
                seconds |= wake_up(url, core)
            if own.restart:
                seconds |= restart(server, url, core)
        finally:
            server.terminate()
            server.wait()
        rounded: dict[str, object] = {name: round(value, 2) for name, value in seconds.items()}
        return {**rounded, **from_log(log), **in_mib(peaks)}


def wake_up(url: str, core: int) -> dict[str, float]:
    """Put the engine to sleep and wake it."""
    post(f"{url}/sleep?level=1")
    started, cpu = time.monotonic(), cpu_seconds(core)
    post(f"{url}/wake_up")
    return {"wake_seconds": time.monotonic() - started, "wake_core_cpu_seconds": cpu_seconds(core) - cpu}


def restart(server: subprocess.Popen[bytes], url: str, core: int) -> dict[str, float]:
    """Kill the engine once the spare process is idle, and wait for the next one."""
    while len(cores_of(server.pid)) < 2:
        time.sleep(POLL_SECONDS)
    (spare,) = (pid for pid in cores_of(server.pid) if pid != core)
    before = -1.0
    while cpu_seconds(spare) != before:
        before = cpu_seconds(spare)
        time.sleep(1)
    started = time.monotonic()
    os.kill(core, signal.SIGKILL)
    while is_ready(url):
        pass
    wait_until_ready(server, url)
    return {"restart_seconds": time.monotonic() - started, "restart_core_cpu_seconds": cpu_seconds(spare) - before}


def post(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=TIMEOUT_SECONDS).close()


def cores_of(pid: int) -> list[int]:
    """The engine's process, and its spare."""
    return [each for each in tree_of(pid)[1:] if name_of(each) == "core"]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Ask until the answer is 200. Raises `RuntimeError` for a server that ends, `TimeoutError` or `TimeoutError`."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        if is_ready(url):
            return
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"not ready after {TIMEOUT_SECONDS} s")


def is_ready(url: str) -> bool:
    """Whether the server answers that it is."""
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=TIMEOUT_SECONDS):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def from_log(log: IO[str]) -> dict[str, object]:
    """What the engine says of itself."""
    log.seek(0)
    text = log.read()
    found = {"stages": STAGES.search(text), "weights": WEIGHTS.search(text)}
    return {key: match[1].strip() if match else None for key, match in found.items()}


def tree_of(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree_of(int(child)))]


def name_of(pid: int) -> str:
    """What a process of the server is, from its command line."""
    command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    names = {"pagoda.engine.core.process": "core", "pagoda serve": "server"}
    if not command:
        return "ended"
    return next((name for words, name in names.items() if words in command), command.split()[-3])


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def in_mib(peaks: dict[str, int]) -> dict[str, object]:
    """The peaks by process, and their sum."""
    return {f"{name}_peak_mib": size // MIB for name, size in peaks.items()} | {
        "all_peaks_mib": sum(peaks.values()) // MIB
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main()
