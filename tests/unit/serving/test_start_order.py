"""The engine has its configuration before the server imports its own libraries, which keeps the event loop busy."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from typing import Any

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine import wire
from pagoda.engine.client import prelaunch
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.data_parallel.client import create_engine_client
from pagoda.engine.messages import StartCore


@pytest.mark.parametrize("data_parallel_size", [1, 2])
async def test_a_client_is_configured_when_its_first_core_was_sent_the_configuration(
    monkeypatch: pytest.MonkeyPatch, data_parallel_size: int
) -> None:
    received: list[socket.socket] = []
    start = subprocess.Popen

    def popen(command: list[str], *, pass_fds: tuple[int, ...], **settings: Any) -> subprocess.Popen[bytes]:
        received.append(socket.socket(fileno=os.dup(pass_fds[0])))
        return start(["sleep", "60"])

    monkeypatch.setattr(prelaunch.subprocess, "Popen", popen)
    config = PagodaConfig(model="none", device="cpu", data_parallel_size=data_parallel_size)
    with PrelaunchedProcess() as launched:
        client = create_engine_client(config, launched)
        starting = asyncio.ensure_future(client.start())
        async with asyncio.timeout(30):
            await client.configured.wait()
        core = received[0]
        core.setblocking(False)  # it is there already, without another turn of the event loop
        header = core.recv(wire.HEADER.size)
        message = wire.decode(header, core.recv(wire.payload_size(header)))
        assert isinstance(message, StartCore)
        assert message.config["model"] == "none"
        for one in received:
            one.close()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.shutdown()
