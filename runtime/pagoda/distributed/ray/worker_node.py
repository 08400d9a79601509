"""A worker node of the Ray cluster for as long as it is wanted: `pagoda join`.

    wait for the head ──▶ ray start --block … until a disconnect ──▶ wait for the head again
                            │                                              │
                            └── ranks run as its children                  └── gives up after rendezvous_timeout_seconds

A head that restarts is joined again from here: a container that exited each time would wait ever longer for its next start.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.node_state import DIRECTORY_VARIABLE, JOINED, StateFile, node_file, prepare_directory
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.distributed.ray.head import STARTED, end_ray, last_error
from pagoda.distributed.ray.node import RayNode, ray_environment, refusal_in, require_ray, split_address, wait_for_head
from pagoda.distributed.ray.open_ports import describe_open_ports
from pagoda.errors import CommunicationError, ConfigError
from pagoda.parallel.interfaces import choose_interface, export_interface
from pagoda.process_control import reap_orphans

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_PAUSE_SECONDS = 1.0
_END_SECONDS = 5.0
_SILENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Membership:
    """How a membership in the cluster ended; `began`: this node had joined. `text`: Ray's whole output."""

    began: bool
    text: str

    @property
    def reason(self) -> str:
        """Why it ended, from Ray's output."""
        return last_error(self.text)


class WorkerNode:
    """This machine as a worker of the head at `address` (HOST or HOST:PORT).

    `offer`: what it offers, in which the addresses are filled in here. `is_subreaper`: this process adopts what Ray leaves
    behind, and starts nothing else.
    """

    def __init__(
        self,
        config: PagodaConfig,
        address: str,
        offer: RayNode,
        state_directory: Path,
        *,
        is_subreaper: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._is_subreaper = is_subreaper
        self._host, port = split_address(address)
        self._address = f"{self._host}:{port}" if ":" not in self._host else f"[{self._host}]:{port}"
        self._offer = offer
        self._directory = state_directory
        self._stopped = threading.Event()
        self._state: StateFile
        self._authentication: RayAuthentication
        self._last_status = ""

    def stop(self) -> None:
        """Leave the cluster; `run` then returns."""
        self._stopped.set()

    def run(self) -> None:
        """Join, and join again after a disconnect from the head, until `stop`.

        Raises:
            ConfigError: the head refuses this node: another version of Ray, a wrong token.
            CommunicationError: no head came (back) within `rendezvous_timeout_seconds`.
        """
        version = require_ray()
        prepare_directory(self._directory)
        self._authentication = RayAuthentication.of_member(os.environ)
        if not self._authentication.has_token:
            logger.warning("Ray: %s", self._authentication)
        self._state = node_file(self._directory, _SILENCE_SECONDS)
        patience = self._config.rendezvous_timeout_seconds
        deadline = self._clock() + patience
        while wait_for_head(self._address, deadline, self._report_waiting, self._stopped.is_set, self._clock):
            ended = self._belong(deadline)
            if self._stopped.is_set():
                return
            refusal = None if ended.began else refusal_in(ended.text, self._address, version)
            if refusal is not None:
                raise ConfigError(refusal)
            if ended.began:
                logger.warning("disconnected from the Ray head at %s (%s): joining again", self._address, ended.reason)
                deadline = self._clock() + patience
            elif self._clock() > deadline:
                raise CommunicationError(
                    f"the Ray cluster at {self._address} could not be joined in time: {ended.reason}"
                )
            else:
                self._report_waiting(f"the Ray head at {self._address} did not take this node yet: {ended.reason}")
            self._stopped.wait(_PAUSE_SECONDS)

    def _belong(self, deadline: float) -> _Membership:
        """Run Ray until it ends, `stop` is called, or `deadline` comes before it has joined."""
        interface = choose_interface(self._config.network_interface, self._host)
        logger.info("joining the Ray cluster at %s over %s", self._address, interface)
        environ = {**ray_environment(os.environ, self._authentication), DIRECTORY_VARIABLE: str(self._directory)}
        if self._config.network_interface is not None:
            export_interface(interface, environ)  # so that ranks of this node use it too
        node = replace(self._offer, address=interface.address, head_address=self._address)
        log = self._directory / "ray.log"
        with log.open("wb") as output:
            ray = subprocess.Popen(
                node.command(),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        began = False
        try:
            while ray.poll() is None and not self._stopped.is_set() and (began or self._clock() < deadline):
                if not began and STARTED in _text(log):
                    began = True
                    logger.info("this node belongs to the Ray cluster at %s", self._address)
                    self._state.enter(JOINED, self._address)
                    describe_open_ports(interface.address, logger)
                self._state.beat()
                if self._is_subreaper:
                    reap_orphans(ray.pid)
                self._stopped.wait(_LOOK_SECONDS)
        finally:
            end_ray(ray, _END_SECONDS)
            _end_session(ray.pid)
        self._state.enter("left", self._address)
        if not began and self._clock() > deadline:
            return _Membership(began, "Ray did not come up in the time that was left")
        return _Membership(began, _text(log))

    def _report_waiting(self, words: str) -> None:
        self._state.enter("waiting", words)
        if words != self._last_status:
            self._last_status = words
            logger.info("%s", words)


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _end_session(leader: int) -> None:
    """Kill what is left of the session that Ray ran in, ranks among them, so that the next one finds their memory free."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
