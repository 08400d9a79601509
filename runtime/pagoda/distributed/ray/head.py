"""A Ray head of our own, for a server that is given no cluster: `python -m pagoda.distributed.ray.head OWNER_PID …`.

    server ──▶ engine core ──▶ this ──▶ ray start --head --block
       └──────── lives as long as ────────▶┘

It belongs to the server and not to the core that started it, so it outlives a core: worker nodes stay, and the next core finds
the head by the file that this process keeps.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

from pagoda.distributed.node_state import (
    READY,
    PublishedState,
    StateFile,
    is_alive,
    process_start,
    published,
)
from pagoda.distributed.private_directory import default_directory, make_private
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.distributed.ray.node import HEAD_PORT, RayNode, ray_environment, split_address, trouble_with
from pagoda.distributed.ray.open_ports import describe_open_ports
from pagoda.errors import CommunicationError, ConfigError
from pagoda.parallel.interfaces import listen_on
from pagoda.process_control import become_subreaper, end_with_parent, reap_orphans

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_MAX_FAILURES = 3
_PATIENCE_SECONDS = 5.0
STARTED = "Ray runtime started"


def ensure_head(
    owner: int,
    offer: RayNode,
    choose_address: Callable[[], str],
    deadline: float,
    on_progress: Callable[[str], None],
) -> str:
    """HOST:PORT of the head that belongs to the process `owner`; started if there is none yet, as `offer` at a chosen address.

    One that has to be started again is started at the same address, where workers look for it. One that is about to end is
    waited for. Ray may fail to start on a busy machine, so it is tried more than once. Replicas of an engine have one owner,
    and one of them starts the head of all.

    Raises:
        ConfigError: the port is taken.
        CommunicationError: the head did not start; with its last error.
    """
    with (_directory() / f"{_name(owner)}.lock").open("a+") as lock:
        while not _is_locked(lock) and time.monotonic() < deadline:
            on_progress("waiting for another replica to start a Ray head")
            time.sleep(_LOOK_SECONDS)
        found = _find(owner)
        if found is not None and _is_up(found):
            return found.detail
        address = _remembered(lock, owner) or choose_address()
        _remember(lock, owner, address)
        started = _ensure_head(owner, replace(offer, address=address), deadline, on_progress)
        logger.info(
            "the Ray head at %s: %s; nodes that join need the same", started, RayAuthentication.of_head(os.environ)
        )
        describe_open_ports(address, logger)
        return started


def _remembered(lock: IO[str], owner: int) -> str | None:
    """The address of the head before, if this same process was its owner."""
    lock.seek(0)
    start, _, address = lock.read().partition(" ")
    return address if start == str(process_start(owner)) else None


def _remember(lock: IO[str], owner: int, address: str) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(f"{process_start(owner)} {address}")
    lock.flush()


def _is_locked(lock: IO[str]) -> bool:
    """Take the lock if it is free; the kernel gives it back with the file's end, or the process's."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ensure_head(owner: int, node: RayNode, deadline: float, on_progress: Callable[[str], None]) -> str:
    head = replace(node, head_port=HEAD_PORT if node.head_port is None else node.head_port)
    address = f"{head.address}:{head.head_port}"
    log = _directory() / f"{_name(owner)}.log"
    starter: subprocess.Popen[bytes] | None = None
    num_failures, trouble = 0, None
    while (found := _find(owner)) is None or not _is_up(found):
        if starter is not None and starter.poll() is not None:
            num_failures += 1
            words = last_error(_text(log))
            if num_failures == _MAX_FAILURES:
                raise CommunicationError(f"the Ray head did not start: {words} (all of it: {log})")
            logger.warning("the Ray head did not start: %s; trying again", words)
            starter = None
        if found is None and starter is None:
            trouble = _trouble_with_port(head)
            if trouble is None:
                starter = _start(owner, head, address, log)
        if time.monotonic() > deadline:
            if starter is not None:
                starter.terminate()
            raise CommunicationError(f"the Ray head at {address} did not start in time: {trouble or f'its log: {log}'}")
        on_progress(f"starting a Ray head at {address}" + (f": {trouble}" if trouble else ""))
        time.sleep(_LOOK_SECONDS)
    return found.detail


def _start(owner: int, head: RayNode, address: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pagoda.distributed.ray.head", str(owner), address, str(log), *head.command()],
            env=ray_environment(os.environ, RayAuthentication.of_head(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the server, which ends first
        )


def _find(owner: int) -> PublishedState | None:
    """The state that the process which keeps the head of `owner` publishes, if there is one."""
    _, states = published(_directory())
    return next((state for state in states if state.name == _name(owner)), None)


def _is_up(state: PublishedState) -> bool:
    return state.phase == READY and trouble_with(*split_address(state.detail)) is None


def last_error(text: str) -> str:
    """The line of Ray's output that best explains its end: the last with an error in it, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line or "mismatch" in line]
    return (errors or lines or ["no output"])[-1]


def _trouble_with_port(node: RayNode) -> str | None:
    """Why the port cannot be opened just now: the interface is down. Raises `ConfigError` where it is taken."""
    assert node.head_port is not None
    try:
        with listen_on(node.address, node.head_port):
            return None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"{error.strerror or error}"
        where = f"{node.address}:{node.head_port}"
        raise ConfigError(
            f"ray_address=none: a Ray head cannot be started at {where}: the port is taken; "
            f"to use a head that runs there set ray_address={where}"
        ) from error


def _name(owner: int) -> str:
    return f"ray-head-of-{owner}"


def _directory() -> Path:
    return make_private(make_private(default_directory()) / "heads")


def main(owner: int, address: str, log: Path, command: list[str]) -> int:
    """Run the head until it or its owner ends; its exit status."""
    told_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.append(True))
    become_subreaper()
    state = StateFile(_directory(), _name(owner), timeout=_PATIENCE_SECONDS)
    state.enter("starting", address)
    ray = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGTERM))
    is_up = False
    while ray.poll() is None and is_alive(owner) and not told_to_stop:
        if not is_up and STARTED in _text(log):
            is_up = True
            state.enter(READY, address)
        state.beat()
        reap_orphans(ray.pid)
        time.sleep(_LOOK_SECONDS)
    state.enter("ending", address)
    return end_ray(ray, _PATIENCE_SECONDS)


def end_ray(ray: subprocess.Popen[bytes], patience_seconds: float) -> int:
    """End `ray start --block`, which takes its processes with it; by force after `patience_seconds`. Its exit status."""
    if ray.poll() is None:
        ray.terminate()
    try:
        return ray.wait(patience_seconds)
    except subprocess.TimeoutExpired:
        ray.kill()  # its reaper ends the rest
        return ray.wait()


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
