"""A model in two stages on two hosts: where its traffic goes, that its answers are right, and every loss there is.

Answers are compared with those of one process. Times are printed, not asserted: docs/operations.md says what is promised.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagoda import LLM, SamplingParams
from tests.support.network_nodes import NetworkNode
from tests.support.notes import Note
from tests.support.two_nodes import (
    NOTICE_SECONDS,
    QUESTIONS,
    START_SECONDS,
    Answers,
    Question,
    TwoNodes,
    lines_with,
    two_nodes,
)
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def references() -> dict[Question, str]:
    """The texts of one process that has the whole model."""
    with LLM(dtype="float32") as llm:
        texts = {}
        for prompt, length in QUESTIONS:
            sampling = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
            texts[prompt, length] = llm.generate(prompt, sampling)[0].outputs[0].text
    return texts


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes"), number=1) as nodes:
        nodes.join()
        assert nodes.probe_worker("ready")[0] == 1
        nodes.serve()
        nodes.until_ready()
        yield nodes


def check_answers(pair: TwoNodes, references: dict[Question, str]) -> None:
    """A quiet server gives the right answers."""
    answers = Answers()
    for question in QUESTIONS:
        pair.ask(question, answers)
    answers.check(references)
    assert len(answers.finished) == len(QUESTIONS), answers.refused


def disturb(
    pair: TwoNodes,
    references: dict[Question, str],
    note: Note,
    what: str,
    do: Callable[[], object],
    mend: Callable[[], object] = lambda: None,
) -> None:
    """Disturb a pair under load: it is noticed, nobody gets a wrong answer, and afterwards all is as before."""
    with pair.load() as answers:
        wait_until(lambda: len(answers.finished) > 3, "answers before the disturbance", seconds=120)
        do()
        noticed = pair.until_unready()
        mend()
        ready = pair.until_ready()
        finished = len(answers.finished)
        wait_until(lambda: len(answers.finished) > finished + 3, "answers after the disturbance", seconds=120)
    answers.check(references)
    note(f"{what}: unready after {noticed:.1f} s, ready again {ready:.1f} s later; {answers.summary}")
    check_answers(pair, references)
    wait_until(lambda: pair.probe_worker("ready")[0] == 0, "the worker's readiness", seconds=60)


def test_answers_are_those_of_one_process_and_the_interface_on_the_route_carries_the_traffic(
    pair: TwoNodes, references: dict[Question, str], note: Note
) -> None:
    assert [len(pair.ranks_on(node)) for node in (pair.head, pair.worker)] == [1, 1]
    nodes = (pair.head, pair.worker)
    before = [(node.bytes_on("eth0"), node.bytes_on("eth1")) for node in nodes]
    check_answers(pair, references)
    after = [(node.bytes_on("eth0"), node.bytes_on("eth1")) for node in nodes]
    carried = [(late[0] - early[0], late[1] - early[1]) for early, late in zip(before, after, strict=True)]
    num_tokens = sum(length for _, length in QUESTIONS)
    note(f"{num_tokens} tokens: {carried[1][0]} bytes over the worker's eth0, {carried[1][1]} over its eth1")
    hidden_state_bytes = 192 * 4
    for chosen, other in carried:
        assert chosen > num_tokens * hidden_state_bytes
        assert other < 10_000
    ready = lines_with(pair.head.log("serve.log"), ["engine ready after"])
    note(f"start-up over two nodes: {ready[0].partition('after ')[2]}")
    interface = lines_with(pair.head.log("serve.log"), ["rank 1 on", "over eth0"])
    assert interface


def test_probes_of_the_worker_tell_its_own_rank(pair: TwoNodes) -> None:
    status, words = pair.probe_worker("ready")
    assert status == 0
    assert re.search(r"node joined, \S+:6379; rank [01] ready", words)
    assert pair.probe_worker("live")[0] == 0
    (rank,) = pair.ranks_on(pair.worker)
    os.kill(rank, signal.SIGKILL)
    wait_until(
        lambda: pair.probe_worker("ready")[0] == 1, "the lost rank in the worker's readiness", seconds=NOTICE_SECONDS
    )
    assert pair.probe_worker("live")[0] == 0
    pair.until_ready()
    wait_until(lambda: pair.probe_worker("ready")[0] == 0, "the worker's readiness", seconds=START_SECONDS)


@pytest.mark.parametrize("side", ["head", "worker"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped(
    pair: TwoNodes, references: dict[Question, str], note: Note, side: str, number: signal.Signals
) -> None:
    node: NetworkNode = getattr(pair, side)
    (rank,) = pair.ranks_on(node)
    disturb(pair, references, note, f"{number.name} of the rank on the {side}'s node", lambda: os.kill(rank, number))
    assert lines_with(pair.head.log("serve.log"), ["the ranks failed", f"host {node.name}, pid {rank}"])


@pytest.mark.parametrize("side", ["head", "worker"])
def test_a_link_that_goes_down(pair: TwoNodes, references: dict[Question, str], note: Note, side: str) -> None:
    node: NetworkNode = getattr(pair, side)
    disturb(
        pair,
        references,
        note,
        f"link of the {side}'s node down",
        lambda: node.set_link("eth0", "down"),
        lambda: node.set_link("eth0", "up"),
    )
    assert lines_with(pair.head.log("serve.log"), ["the ranks failed", f"host {pair.worker.name}"])


def test_a_head_that_is_killed(pair: TwoNodes, references: dict[Question, str], note: Note) -> None:
    (gcs,) = pair.head.pids_of("gcs_server")
    disturb(pair, references, note, "SIGKILL of the Ray head", lambda: os.kill(gcs, signal.SIGKILL))
    assert lines_with(pair.worker.log("join.log"), ["disconnected from the Ray head", "joining again"])


def test_a_worker_node_that_loses_ray(pair: TwoNodes, references: dict[Question, str], note: Note) -> None:
    (raylet,) = pair.worker.pids_of("raylet/raylet")
    disturb(pair, references, note, "SIGKILL of the worker's raylet", lambda: os.kill(raylet, signal.SIGKILL))


def test_a_worker_that_is_replaced(pair: TwoNodes, references: dict[Question, str], note: Note) -> None:
    def replace() -> None:
        pair.joined.terminate()
        assert pair.joined.wait(30) == 0

    disturb(pair, references, note, "SIGTERM of `pagoda join`", replace, pair.join)


def test_an_engine_core_that_is_killed_finds_its_head_again(
    pair: TwoNodes, references: dict[Question, str], note: Note
) -> None:
    (core,) = pair.head.pids_of("pagoda.engine.core.process")
    gcs = pair.head.pids_of("gcs_server")
    disturb(pair, references, note, "SIGKILL of the engine core", lambda: os.kill(core, signal.SIGKILL))
    assert pair.head.pids_of("gcs_server") == gcs


def test_both_end_when_told_and_leave_nothing_behind(pair: TwoNodes) -> None:
    pair.server.terminate()
    assert pair.server.wait(90) == 0
    pair.joined.terminate()
    assert pair.joined.wait(60) == 0
    deadline = time.monotonic() + 60
    while left := [pid for node in (pair.head, pair.worker) for pid in node.pids()]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.2)


def test_tensor_groups_stay_on_a_node_and_stages_do_not(
    tmp_path: Path, references: dict[Question, str], note: Note
) -> None:
    with two_nodes(tmp_path, number=4) as pair:
        pair.join("--ray-num-cpus=2")
        pair.serve("--ray-num-cpus=2", "--tensor-parallel-size=2")
        pair.until_ready()
        assert [len(pair.ranks_on(node)) for node in (pair.head, pair.worker)] == [2, 2]
        log = pair.head.log("serve.log")
        hosts = re.findall(r"rank (\d) on (\S+) \(pid", log)
        assert len({host for rank, host in hosts if rank in "01"}) == 1
        assert len({host for rank, host in hosts if rank in "23"}) == 1
        assert len({host for _, host in hosts}) == 2
        for line in lines_with(log, ["ms at most"]):
            note(line.partition("rank_group: ")[2])
        check_answers(pair, references)
