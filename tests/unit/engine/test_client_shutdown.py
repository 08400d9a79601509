"""The end of an engine client whose core was lost: no core is started for it any more, and one just started is told to end."""

from __future__ import annotations

import asyncio

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client import process_client as client_module
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.health import EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineReady, Shutdown

READY = EngineReady(max_model_len=8, max_num_seqs=1, max_num_batched_tokens=8, num_blocks=2, block_size=8, vocab_size=9)


class FakeCore:
    """Ready at once; its connection ends when it is `lost`, killed or told to end."""

    is_connected = True
    num_unsent_bytes = 0
    was_killed_by_others = False
    pid = 0
    progress = EngineHeartbeat(0, 0.0, 0, is_busy=False)

    def __init__(self) -> None:
        self.messages: asyncio.Queue[EngineReady | None] = asyncio.Queue()
        self.messages.put_nowait(READY)
        self.is_told_to_end = self.was_killed = False

    def send(self, message: object) -> None:
        if isinstance(message, Shutdown):
            self.is_told_to_end = True
            self.lose()

    def lose(self) -> None:
        self.messages.put_nowait(None)

    async def receive(self) -> EngineReady | None:
        return await self.messages.get()

    async def kill(self, *, dump_stacks: bool = False) -> None:
        self.was_killed = True
        self.lose()

    async def reap(self, patience: float) -> str:
        return "exited with code 0"


class Cores:
    """Every core that a client has started; `start` waits while `may_start` is not set."""

    def __init__(self) -> None:
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.num_asked = 0
        self.started: list[FakeCore] = []

    async def start(self, *_: object, **__: object) -> FakeCore:
        self.num_asked += 1
        await self.may_start.wait()
        self.started.append(FakeCore())
        return self.started[-1]


@pytest.fixture
async def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    cores = Cores()
    monkeypatch.setattr(client_module, "EngineCoreHandle", cores)
    return cores


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_client_that_is_shut_down_in_the_pause_before_a_restart_starts_no_core(cores: Cores) -> None:
    client = ProcessEngineClient(PagodaConfig())
    await client.start()
    cores.started[0].lose()
    await until(lambda: client.health.state is EngineState.STARTING)
    await client.shutdown()
    assert (cores.num_asked, client.health.state) == (1, EngineState.DEAD)


async def test_a_core_that_is_just_being_started_is_told_to_end(cores: Cores) -> None:
    client = ProcessEngineClient(PagodaConfig())
    await client.start()
    cores.may_start.clear()
    cores.started[0].lose()
    await until(lambda: cores.num_asked == 2)
    ending = asyncio.create_task(client.shutdown())
    await asyncio.sleep(0)
    cores.may_start.set()
    await ending
    _, late = cores.started
    assert late.is_told_to_end
    assert not late.was_killed
    assert client.health.state is EngineState.DEAD
