"""Ranks in processes of their own: the tokens of one process, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.multi_process import ProcessLauncher
from pagoda.distributed.rank_links import RankLinks
from pagoda.distributed.rank_messages import RankHello, RankPrepared, StartRank
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import EngineDeadError, PagodaError
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import shared_checkpoint
from tests.support.observer import is_there
from tests.support.waiting import wait_until

NUM_REQUESTS = 6


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint()


def core_of(checkpoint: Path, stages: list[str] | None = None, **settings) -> EngineCore:
    values = {
        "model": str(checkpoint),
        "device": "cpu",
        "threads": 1,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,  # so that prompts come in chunks
        "max_model_len": 120,
        "num_gpu_blocks_override": 13,  # so that some are preempted
        "rendezvous_timeout_seconds": 600,  # importing torch takes long on a busy machine
        **settings,
    }
    return start_core(PagodaConfig(**values), None if stages is None else lambda name, _: stages.append(name))


@contextmanager
def running_core(checkpoint: Path, **settings) -> Iterator[EngineCore]:
    """A core that is ended in the end, and its ranks with it."""
    core = core_of(checkpoint, **settings)
    pids = [rank.pid for rank in core.ranks()]
    try:
        yield core
    finally:
        core.shutdown()
        assert not any(map(is_there, pids))


def submit(core: EngineCore, max_tokens: int = 40) -> None:
    for index in range(NUM_REQUESTS):
        prompt = [3 + (index * 31 + place * 7) % 400 for place in range(5 + 9 * index)]
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=2 if index == 1 else None)
        core.add_request(
            EngineRequest(
                request_id=f"r{index}",
                prompt_token_ids=prompt,
                params=sampling,
                max_tokens=max_tokens,
                arrival_time=index,
            )
        )


def run(core: EngineCore) -> dict[str, list[int]]:
    """All requests to their ends; their tokens."""
    submit(core)
    tokens: dict[str, list[int]] = {f"r{index}": [] for index in range(NUM_REQUESTS)}
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None
            tokens[output.request_id] += output.new_token_ids
    return tokens


def drain(core: EngineCore) -> None:
    while core.has_work:
        core.step()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    core = core_of(checkpoint)
    tokens = run(core)
    assert core.stats().num_preemptions > 0
    return tokens


def test_two_tensor_ranks_give_the_same_tokens_and_survive_a_step_that_fails_on_both(checkpoint, expected) -> None:
    stages: list[str] = []
    settings = {"tensor_parallel_size": 2, "fault_injection": "step#30=raise,step#50=oom"}
    with running_core(checkpoint, stages=stages, **settings) as core:
        names = ["config", "hardware", "launch", "rendezvous", "communication", "weights", "kv", "warm-up"]
        assert list(dict.fromkeys(stages)) == names
        assert list(core.ready.phase_seconds) == names
        assert [rank.rank for rank in core.ranks()] == [0, 1]
        submit(core)
        errors: list[str | None] = []
        while core.has_work:
            errors += [output.error for output in core.step().outputs if output.finish_reason is not None]
        assert (
            sum("injected fault at step" in error for error in errors if error) > 0
        )  # the step's requests, and no more
        assert len(errors) == NUM_REQUESTS
        assert core.stats().degradation  # smaller steps, after the lack of memory that ended no request
        assert run(core) == expected


def test_two_pipeline_stages_give_the_same_tokens_and_a_killed_one_is_noticed_at_once(checkpoint, expected) -> None:
    with running_core(checkpoint, pipeline_parallel_size=2) as core:
        assert run(core) == expected
        pids = [rank.pid for rank in core.ranks()]
        submit(core)
        for _ in range(5):
            core.step()
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=rf"rank 0 of 2 \(host .*, pid {pids[0]}\) was killed by SIGKILL"):
            drain(core)
        wait_until(lambda: not any(map(is_there, pids)))  # the other one ends with it, before anybody asks it to
        with pytest.raises(EngineDeadError, match="rank 0"):
            core.check_health()


def test_a_single_rank_in_a_process_of_its_own_gives_the_same_tokens(checkpoint, expected) -> None:
    with running_core(checkpoint, distributed_executor_backend="mp") as core:
        assert len(core.ranks()) == 1
        assert run(core) == expected
        open_before = num_open_files()
    assert num_open_files() < open_before  # the connection is closed


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_a_rank_cannot_do_is_told_with_its_name_and_leaves_nothing_behind(checkpoint, monkeypatch) -> None:
    pids: list[int] = []
    start = ProcessLauncher._start

    def noting(self: ProcessLauncher, rank: int) -> socket.socket:
        ours = start(self, rank)
        pids.append(self._processes[-1].pid)
        return ours

    monkeypatch.setattr(ProcessLauncher, "_start", noting)
    with pytest.raises(
        PagodaError, match=r"rank 0 of 1 \(host .*\): network_interface=nic7: there is no interface 'nic7'"
    ):
        core_of(checkpoint, distributed_executor_backend="mp", network_interface="nic7")
    assert len(pids) == 1
    assert not is_there(pids[0])


def test_the_first_rank_listens_at_the_rendezvous_from_the_moment_it_names_the_port(checkpoint) -> None:
    config = PagodaConfig(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        tensor_parallel_size=2,
    )
    launcher = ProcessLauncher()
    deadline = time.monotonic() + 150
    links = RankLinks(launcher.launch(1, 0.0, lambda _: None), launcher.death_of)
    try:
        links.collect(RankHello, deadline=deadline, otherwise="did not start")
        start = StartRank(
            config=config.without_secrets(), rank=0, ranks_on_host=2, device_index=0, route_to=None, uses_ray=False
        )
        links.send_each([start])
        (prepared,) = links.collect(RankPrepared, deadline=deadline, otherwise="did not take its configuration")
        with pytest.raises(OSError, match="in use"):
            socket.create_server((prepared.info.address, prepared.port))
    finally:
        links.end("the test is over")
        launcher.terminate(5.0)
        links.close()
