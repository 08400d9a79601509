"""The core's process as seen by its parent: start, messages, heartbeat, kill, reap."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from pagoda.config.schema import PagodaConfig
from pagoda.engine import wire
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import StartCore
from pagoda.process_control import STACKS_SIGNAL

_STACKS_SECONDS = 0.5


class EngineCoreHandle:
    """A running core process. Made by `start`; ended by `reap`, which must be called once."""

    def __init__(self, core: PrelaunchedProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process = core.process
        self._heartbeat = core.heartbeat
        self._reader = reader
        self._writer = writer
        self.is_connected = True
        self._was_told_to_die = False

    @classmethod
    async def start(
        cls,
        config: PagodaConfig,
        environment: Mapping[str, str] | None = None,
        launched: PrelaunchedProcess | None = None,
        *,
        niceness: int = 0,
    ) -> EngineCoreHandle:
        """Start a core with this configuration; it reports its start-up phases from here on.

        `environment`: variables that it gets beside those of this process. `launched`: its process, where there is one.
        `niceness`: of its imports and start, see `StartCore`.
        """
        core = (launched or PrelaunchedProcess(niceness=niceness)).take()
        reader, writer = await asyncio.open_unix_connection(sock=core.socket)
        child = cls(core, reader, writer)
        child.send(StartCore(config.without_secrets(), dict(environment or {}), niceness))
        return child

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def heartbeat(self) -> EngineHeartbeat:
        """The core's last heartbeat, read from shared memory."""
        return self._heartbeat.read()

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes of messages that the core has not taken yet."""
        return self._writer.transport.get_write_buffer_size()

    @property
    def was_killed_by_others(self) -> bool:
        """Whether it ended by a SIGKILL that did not come from here: the OOM killer's or an operator's."""
        return self.process.returncode == -signal.SIGKILL and not self._was_told_to_die

    def send(self, message: wire.Message) -> None:
        """Queue a message; dropped after a disconnect."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def receive(self) -> wire.Message | None:
        """The next message, or None when the connection has ended."""
        try:
            header = await self._reader.readexactly(wire.HEADER.size)
            return wire.decode(header, await self._reader.readexactly(wire.payload_size(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_connected = False
            return None

    async def kill(self, *, dump_stacks: bool = False) -> None:
        """End the process now; with `dump_stacks`, the stacks of its threads go to the log first."""
        self._was_told_to_die = True
        with suppress(ProcessLookupError):
            if dump_stacks:
                os.kill(self.pid, STACKS_SIGNAL)
                os.kill(self.pid, signal.SIGCONT)  # a stopped process would not dump them
                await asyncio.sleep(_STACKS_SECONDS)
            os.kill(self.pid, signal.SIGKILL)  # ends a stopped process too

    async def reap(self, patience: float) -> str:
        """Wait for the process, kill it after `patience` seconds, free its resources, and return how it ended."""
        deadline = time.monotonic() + patience
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                await self.kill()
            await asyncio.sleep(0.01)
        self.is_connected = False
        self._writer.close()
        self._heartbeat.close()
        code = self.process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
