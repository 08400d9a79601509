"""The loop of the core's process: what counts as a sign of life, and how refusals travel."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Never

import pytest

from pagoda.engine import wire
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.core import process, service
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.service import EngineCoreLoop
from pagoda.engine.heartbeat import SharedHeartbeat
from pagoda.engine.messages import (
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    EngineReady,
    EngineStats,
    Shutdown,
    StartCore,
)
from pagoda.errors import ErrorKind, InvalidRequestError, QueueFullError
from pagoda.execution.executor import StepHandle
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.scheduler import Scheduler

REQUEST = EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(), max_tokens=1)


class Connection:
    """The process's end of the connection, without a socket."""

    def __init__(self) -> None:
        self.inbox: queue.Queue = queue.Queue()
        self.sent: list = []
        self.send = self.sent.append


class Core:
    """A core that always has work; each turn brings what `turn` says."""

    has_work = True
    num_tokens_in_flight = 0
    on_submit = None

    def __init__(self, turn: Callable[[], EngineOutputs]) -> None:
        self.step = turn

    def stats(self) -> EngineStats:
        return EngineStats()

    def take_trace(self) -> None:
        """Nobody looks."""

    def take_adapter_outcomes(self) -> list[Never]:
        return []

    def ranks(self) -> list[Never]:
        return []


@pytest.fixture
def heartbeat() -> Iterator[SharedHeartbeat]:
    heartbeat = SharedHeartbeat()
    yield heartbeat
    heartbeat.close()


@pytest.mark.parametrize("brings", ["nothing", "a step", "an end outside of a step"])
def test_only_a_turn_that_brings_something_is_a_sign_of_life(heartbeat: SharedHeartbeat, brings: str) -> None:
    connection = Connection()
    num_turns = 0

    def turn() -> EngineOutputs:
        nonlocal num_turns
        num_turns += 1
        if num_turns == 5:
            connection.inbox.put(Shutdown())
        outputs = [EngineOutput(request_id="r", finish_reason=FinishReason.ABORT)] if "end" in brings else []
        return EngineOutputs(outputs, EngineStats(step=num_turns if brings == "a step" else 0), 0.0)

    EngineCoreLoop(Core(turn), connection, heartbeat).run()  # type: ignore[arg-type]
    assert num_turns == 5
    assert heartbeat.read().is_up == (brings != "nothing")
    assert len(connection.sent) == (0 if brings == "nothing" else 5)


def test_a_request_that_could_not_be_read_gets_its_one_end_and_the_core_goes_on(heartbeat: SharedHeartbeat) -> None:
    connection = Connection()
    core = Core(lambda: pytest.fail("there is nothing to run"))
    error = wire.UnreadableRequestError("r", InvalidRequestError("top_p must be at most 1", "top_p"))
    for message in (error, Shutdown()):
        connection.inbox.put(message)
    EngineCoreLoop(core, connection, heartbeat).run()  # type: ignore[arg-type]
    ((output,),) = (message.outputs for message in connection.sent)
    assert (output.request_id, output.error_kind, output.error) == (
        "r",
        ErrorKind.INVALID_REQUEST,
        "top_p must be at most 1",
    )


@pytest.mark.parametrize(
    ("error", "kind"), [(QueueFullError("full", 3), ErrorKind.QUEUE_FULL), (KeyError("x"), ErrorKind.INTERNAL)]
)
def test_a_request_that_is_not_taken_gets_its_one_end(
    heartbeat: SharedHeartbeat, error: Exception, kind: ErrorKind
) -> None:
    connection = Connection()
    core = Core(lambda: pytest.fail("there is nothing to run"))

    def refuse(request: EngineRequest) -> None:
        raise error

    core.add_request = refuse  # type: ignore[attr-defined]
    for message in (REQUEST, Shutdown()):
        connection.inbox.put(message)
    EngineCoreLoop(core, connection, heartbeat).run()  # type: ignore[arg-type]
    (news,) = connection.sent
    (output,) = news.outputs
    assert (output.request_id, output.finish_reason, output.error_kind) == ("r", FinishReason.ERROR, kind)


class PipelineExecutor:
    """Holds two plans; `on_wait` is called with the number of tokens of a plan whose result is waited for."""

    max_concurrent_batches = 2

    def __init__(self, on_wait: Callable[[int], None]) -> None:
        self.on_wait = on_wait

    def submit(self, plan: StepPlan) -> StepHandle:
        def result() -> StepResult:
            self.on_wait(plan.total_tokens)
            return StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples])

        return SimpleNamespace(result=result)

    def ranks(self) -> list[Never]:
        return []


def test_the_tokens_of_all_plans_in_flight_stand_on_the_board_while_any_of_them_runs(
    heartbeat: SharedHeartbeat,
) -> None:
    """The stall bound grows with them: a long prompt has its time, whatever short step was submitted after it."""
    connection, seen = Connection(), []

    def on_wait(num_tokens: int) -> None:
        progress = heartbeat.read()
        seen.append((num_tokens, progress.scheduled_tokens, progress.is_busy))

    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=200, max_num_waiting=4, pipeline_parallel_size=2
    )
    ready = EngineReady(
        max_model_len=200, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=63, block_size=4, vocab_size=99
    )
    core = EngineCore(Scheduler(limits, KVCacheManager(64, 4)), PipelineExecutor(on_wait), ready)  # type: ignore[arg-type]
    for name, length in (("long", 64), ("short", 1)):
        connection.inbox.put(replace(REQUEST, request_id=name, prompt_token_ids=[1] * length))

    def send(message: EngineOutputs) -> None:
        connection.sent.append(message)
        if not core.has_work:
            connection.inbox.put(Shutdown())

    connection.send = send
    EngineCoreLoop(core, connection, heartbeat).run()  # type: ignore[arg-type]
    assert [output.request_id for message in connection.sent for output in message.outputs] == ["long", "short"]
    assert seen == [(64, 65, True), (1, 1, True)]
    assert (heartbeat.read().scheduled_tokens, heartbeat.read().is_busy) == (0, False)


def start(
    monkeypatch: pytest.MonkeyPatch, heartbeat: SharedHeartbeat, first: StartCore, niceness: int = 0
) -> wire.Message:
    """What a core's process, run in this one, says of itself first."""
    monkeypatch.setattr(process, "become_child", lambda: None)
    monkeypatch.setattr(service.Connection, "_read", lambda _: None)  # it ends the process with the connection
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("rb") as stream:
        ours.sendall(wire.encode(first))
        assert process.main(theirs.detach(), os.dup(heartbeat.fd), niceness) == 1
        header = stream.read(wire.HEADER.size)
        return wire.decode(header, stream.read(wire.payload_size(header)))


def test_what_the_engine_cannot_be_imported_for_is_told_to_the_parent(
    monkeypatch: pytest.MonkeyPatch, heartbeat: SharedHeartbeat
) -> None:
    monkeypatch.setattr(process, "_import_engine", lambda: ImportError("libtorch.so: no such file"))
    answer = start(monkeypatch, heartbeat, StartCore({}))
    assert answer == EngineFailed(ErrorKind.ENGINE_DEAD, "ImportError: libtorch.so: no such file")


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_the_engine_is_imported_at_lower_priority_and_runs_at_its_own(
    monkeypatch: pytest.MonkeyPatch, heartbeat: SharedHeartbeat
) -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = priority()
    monkeypatch.setattr(process, "_import_engine", lambda: ImportError(f"at {priority()}"))
    answer = start(monkeypatch, heartbeat, StartCore({}), niceness=3)
    assert answer == EngineFailed(ErrorKind.ENGINE_DEAD, f"ImportError: at {min(19, own + 3)}")
    assert priority() == own


def test_the_core_has_the_variables_that_came_with_its_configuration(
    monkeypatch: pytest.MonkeyPatch, heartbeat: SharedHeartbeat
) -> None:
    monkeypatch.setenv("PAGODA_TEST_DEVICES", "0")

    def fail(*_: object) -> Never:
        raise ValueError(f"devices {os.environ['PAGODA_TEST_DEVICES']}")

    monkeypatch.setattr("pagoda.engine.core.startup.start_core", fail)
    answer = start(monkeypatch, heartbeat, StartCore({}, {"PAGODA_TEST_DEVICES": "2,3"}))
    assert answer == EngineFailed(ErrorKind.ENGINE_DEAD, "ValueError: devices 2,3")


def test_a_core_that_gets_no_configuration_ends() -> None:
    with PrelaunchedProcess() as core:
        core.socket.shutdown(socket.SHUT_RDWR)
        assert core.process.wait(timeout=60) == 0


def test_a_core_that_nobody_took_over_is_ended() -> None:
    with pytest.raises(KeyError), PrelaunchedProcess() as core:
        raise KeyError("the settings are wrong")
    assert core.process.returncode is not None
    assert core.socket.fileno() == -1
