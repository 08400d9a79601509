"""Ranks in threads of the test: they speak the driver's language, hold no model, and misbehave on demand."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pagoda import __version__
from pagoda.config.schema import PagodaConfig
from pagoda.distributed.rank_channel import ChannelEnded, HeartbeatThread, RankChannel
from pagoda.distributed.rank_group import RankGroup
from pagoda.distributed.rank_launcher import RankConnection
from pagoda.distributed.rank_messages import (
    PROTOCOL_VERSION,
    CheckCommunication,
    CommunicationChecked,
    EndRank,
    InitializeKV,
    JoinGroup,
    KVMeasured,
    LoadWeights,
    MeasureKV,
    PhaseDone,
    RankHeartbeat,
    RankHello,
    RankPrepared,
    RunStep,
    StartRank,
    StepDone,
)
from pagoda.parallel.layout import ParallelLayout
from pagoda.parallel.preflight import CommunicationReport
from pagoda.parallel.rank_info import RankInfo
from pagoda.scheduling.plan import StepPlan, StepResult

SECONDS = 10.0

Behaviour = Callable[["FakeRank", Any], Any]


def info_of(rank: int, **changes: Any) -> RankInfo:
    values: dict[str, Any] = {
        "rank": rank,
        "host": f"node-{rank}",
        "pid": 100 + rank,
        "pagoda": __version__,
        "python": "3.11",
        "torch": "2.13.0",
        "nccl": None,
        "ray": None,
        "model_hash": "abc",
        "configuration_hash": "def",
        "dtype": "float32",
        "device": "cpu",
        "device_name": "a CPU",
        "memory_bytes": 2**30,
        "interface": "eth0",
        "address": f"10.0.0.{rank + 1}",
    }
    return RankInfo(**values | changes)


def nothing(rank: FakeRank, command: Any) -> None:
    """Do not answer."""


def hang_up(rank: FakeRank, command: Any) -> None:
    """End the connection, as the kernel does for a process that is killed."""
    rank.channel.close()


class FakeRank:
    """`behaviour`: what it does with a command of a class, in place of the right thing; it returns the answer, if any."""

    def __init__(
        self,
        connected: socket.socket,
        rank: int,
        is_sampling_rank: bool,
        behaviour: dict[type, Behaviour],
        hello: RankHello,
    ) -> None:
        self.rank = rank
        self.is_sampling_rank = is_sampling_rank
        self.channel = RankChannel(connected)
        self.received: list[Any] = []
        self.heartbeat = RankHeartbeat(0, 0)
        self.is_over = threading.Event()
        self._behaviour = behaviour
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.heartbeats: HeartbeatThread | None = None
        self.channel.start(self._inbox.put)
        if RankHello not in behaviour:
            self.channel.send(hello)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not isinstance(command := self._inbox.get(), ChannelEnded):
            self.received.append(command)
            answer = self._behaviour.get(type(command), FakeRank.right_answer)(self, command)
            if answer is not None:
                self.channel.send(answer)
            if isinstance(command, EndRank):
                break
        if self.heartbeats is not None:
            self.heartbeats.stop()
        self.channel.close(1.0)
        self.is_over.set()

    def right_answer(self, command: Any) -> Any:
        if isinstance(command, StartRank):
            self.heartbeats = HeartbeatThread(
                [self.channel], lambda: self.heartbeat, command.config["rank_heartbeat_timeout_seconds"]
            )
            self.heartbeats.start()
            return RankPrepared(info=info_of(self.rank), port=1, threads=1)
        if isinstance(command, JoinGroup):
            return PhaseDone("rendezvous")
        if isinstance(command, CheckCommunication):
            return CommunicationChecked(CommunicationReport(rank=self.rank))
        if isinstance(command, LoadWeights):
            return PhaseDone("weights")
        if isinstance(command, MeasureKV):
            return KVMeasured(100, 10_000)
        if isinstance(command, InitializeKV):
            return PhaseDone("warm-up")
        if isinstance(command, RunStep) and self.is_sampling_rank:
            return StepDone(result_of(command.plan))
        return None


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.step_id, [[1000 + plan.step_id] for _ in plan.req_indices])


def plan_of(step_id: int, req_indices: int = 1) -> StepPlan:
    return StepPlan(
        step_id=step_id,
        request_ids=[f"r{req_index}" for req_index in range(req_indices)],
        req_indices=list(range(req_indices)),
        num_computed_tokens=[step_id] * req_indices,
        num_scheduled_tokens=[1] * req_indices,
        samples=[True] * req_indices,
    )


class FakeLauncher:
    """See `RankLauncher`. `behaviours`: by rank, see `FakeRank`."""

    uses_ray = False

    def __init__(self, config: PagodaConfig, behaviours: dict[int, dict[type, Behaviour]], **hello: Any) -> None:
        self._layout = ParallelLayout(
            config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel
        )
        self._behaviours = behaviours
        self._hello = hello
        self.ranks: list[FakeRank] = []
        self.is_terminated = False

    def launch(
        self, num_ranks: int, timeout_seconds: float, on_progress: Callable[[str], None]
    ) -> list[RankConnection]:
        connections = []
        for rank in range(num_ranks):
            ours, theirs = socket.socketpair()
            hello = RankHello(rank, PROTOCOL_VERSION, __version__, f"node-{rank}", 100 + rank)
            if rank == num_ranks - 1 and self._hello:
                hello = RankHello(
                    **{name: self._hello.get(name, getattr(hello, name)) for name in RankHello.__dataclass_fields__}
                )
            behaviour = self._behaviours.get(rank, {})
            self.ranks.append(FakeRank(theirs, rank, rank == self._layout.sampling_rank, behaviour, hello))
            connections.append(RankConnection(ours, f"node-{rank}", None, device_index=0))
        return connections

    def death_of(self, rank: int) -> str | None:
        return "was killed by SIGKILL" if rank == 1 else None

    def terminate(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        for rank in self.ranks:
            rank.is_over.wait(max(0.0, deadline - time.monotonic()))
            rank.channel.close()
        self.is_terminated = True


class FakeStages:
    """See `Stages`."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def enter(self, name: str, detail: str = "") -> nullcontext[None]:
        self.entered.append(name)
        return nullcontext()

    def detail(self, text: str) -> None:
        self.entered.append(text)


def make_group(
    behaviours: dict[int, dict[type, Behaviour]] | None = None,
    *,
    hello: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> tuple[RankGroup, FakeLauncher]:
    """A group of two fake ranks that is not connected yet. `clock`: that of the driver."""
    config = PagodaConfig(
        **{
            "tensor_parallel_size": 2,
            "device": "cpu",
            "dtype": "float32",
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "rendezvous_timeout_seconds": SECONDS,
            **settings,
        }
    )
    launcher = FakeLauncher(config, behaviours or {}, **(hello or {}))
    return RankGroup(config, None, launcher, clock), launcher  # type: ignore[arg-type]  # fake ranks read no model


@contextmanager
def running_group(
    behaviours: dict[int, dict[type, Behaviour]] | None = None, **settings: Any
) -> Iterator[tuple[RankGroup, FakeLauncher]]:
    """The same, ready for steps; shut down in the end."""
    group, launcher = make_group(behaviours, **settings)
    group.connect(FakeStages())
    group.load()
    group.kv_budget(16)
    group.initialize_kv_cache(10)
    try:
        yield group, launcher
    finally:
        group.shutdown()
        assert launcher.is_terminated
