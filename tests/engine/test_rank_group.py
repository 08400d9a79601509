"""The driver's side of several ranks, with ranks that hold no model and misbehave on demand."""

from __future__ import annotations

import threading
import time

import pytest

from pagoda.distributed.rank_group import RankGroup
from pagoda.distributed.rank_messages import (
    CheckCommunication,
    InitializeKV,
    JoinGroup,
    KernelsRecorded,
    KVMeasured,
    LoadProgress,
    LoadWeights,
    MeasureKV,
    PhaseDone,
    RankFailed,
    RankHeartbeat,
    RankHello,
    RankPrepared,
    RecordKernels,
    RunStep,
    StartRank,
    StepFailed,
)
from pagoda.errors import ConfigError, EngineDeadError, ErrorKind, InvalidRequestError
from pagoda.execution.executor import is_out_of_memory
from pagoda.execution.traced_kernel import TracedKernel
from tests.support.fake_ranks import (
    SECONDS,
    FakeLauncher,
    FakeStages,
    hang_up,
    info_of,
    make_group,
    nothing,
    plan_of,
    result_of,
    running_group,
)
from tests.support.virtual_time import Clock
from tests.support.waiting import wait_until


def failed(step_id: int, **changes) -> StepFailed:
    values = {"error": "ValueError: no", "is_out_of_memory": False, "is_communication": False, "is_out_of_step": False}
    return StepFailed(step_id=step_id, **values | changes)


def failing(at: int, **changes):
    """Fail step number `at` and do the others right."""
    return {RunStep: lambda rank, run: failed(at, **changes) if run.plan.step_id == at else rank.right_answer(run)}


def too_late(clock: Clock, answer=nothing):
    """Do that, after more time than anything may take."""

    def behaviour(rank, command):
        clock.advance(1e6)
        return answer(rank, command)

    return behaviour


def time_passes_with_a_heartbeat_of(rank: int, clock: Clock, group: RankGroup, launcher: FakeLauncher) -> None:
    """From now on each reading of the clock finds that one rank has given a sign of life, and that a second has passed."""

    def beat() -> None:
        before = group.ranks()[rank].last_heartbeat
        launcher.ranks[rank].channel.send(RankHeartbeat(0, 0))
        wait_until(lambda: group.ranks()[rank].last_heartbeat != before)
        clock.advance(1.0)

    clock.on_read = beat


# ---- start-up -----------------------------------------------------------------------------------------------------


def test_start_up_goes_through_its_stages_and_tells_every_rank_its_place() -> None:
    stages = FakeStages()
    group, launcher = make_group()
    group.connect(stages)
    assert stages.entered == ["launch", "rendezvous", "communication"]
    starts = [next(m for m in rank.received if isinstance(m, StartRank)) for rank in launcher.ranks]
    assert [start.rank for start in starts] == [0, 1]
    assert [start.ranks_on_host for start in starts] == [1, 1]
    assert all("api_keys" not in start.config for start in starts)
    group.shutdown()


def test_weights_progress_is_that_of_the_slowest_rank() -> None:
    told = []

    def load(rank, _):
        rank.channel.send(LoadProgress(10 if rank.rank else 90, 100))
        wait_until(lambda: told)  # the driver has both shares before the first answer
        return PhaseDone("weights")

    group, _ = make_group({0: {LoadWeights: load}, 1: {LoadWeights: load}})
    group.connect(FakeStages())
    group.load(lambda *news: told.append(news))
    assert ("rank 1 of 2", 10, 100) in told
    group.shutdown()


def test_the_rank_with_room_for_the_fewest_blocks_limits_all_and_is_named() -> None:
    # More memory, but blocks so large that fewer fit.
    group, _ = make_group({1: {MeasureKV: lambda *_: KVMeasured(1000, 20_000)}})
    group.connect(FakeStages())
    budget = group.kv_budget(16)
    assert (budget.block_bytes, budget.available_bytes) == (1000, 20_000)
    assert "rank 1 of 2 (host node-1, pid 101) limits (blocks that fit: rank 0: 100, rank 1: 20)" in budget.note
    group.shutdown()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (StartRank, r"rank 1 of 2 \(host node-1, pid 101\) did not take its configuration within rend"),
        (JoinGroup, r"rank 1 .* did not meet the others at 10.0.0.1 \(network_interface\) within"),
        (CheckCommunication, r"rank 1 .* did not get through the communication check within"),
    ],
)
def test_a_rank_that_does_not_come_along_ends_the_start_within_its_bound(command, message) -> None:
    clock = Clock()
    group, launcher = make_group({1: {command: too_late(clock)}}, clock=clock)
    with pytest.raises(EngineDeadError, match=message):
        group.connect(FakeStages())
    assert launcher.is_terminated
    with pytest.raises(EngineDeadError, match="rank 1"):
        group.check_health()


def test_a_rank_that_never_connects_ends_the_start_within_its_bound() -> None:
    clock = Clock()
    group, launcher = make_group({1: {RankHello: nothing}}, clock=clock, rendezvous_timeout_seconds=60)
    clock.on_read = lambda: clock.advance(7.0)
    message = r"rank 1 of 2 \(host node-1\) did not connect within rendezvous_timeout_seconds=60"
    with pytest.raises(EngineDeadError, match=message):
        group.connect(FakeStages())
    assert launcher.is_terminated


def test_a_rank_that_is_killed_while_it_joins_ends_the_start() -> None:
    group, launcher = make_group({1: {JoinGroup: hang_up}})
    with pytest.raises(EngineDeadError, match=r"rank 1 of 2 \(host node-1, pid 101\) was killed by SIGKILL"):
        group.connect(FakeStages())
    assert launcher.is_terminated
    with pytest.raises(EngineDeadError, match="rank 1"):
        group.check_health()


@pytest.mark.parametrize("command", [LoadWeights, MeasureKV, InitializeKV])
def test_a_later_stage_is_bounded_by_the_start_timeout(command) -> None:
    clock = Clock()
    group, launcher = make_group({1: {command: too_late(clock)}}, clock=clock, engine_start_timeout_seconds=2)
    group.connect(FakeStages())

    def bring_up() -> None:
        group.load()
        group.kv_budget(16)
        group.initialize_kv_cache(10)

    with pytest.raises(EngineDeadError, match=r"rank 1 .* within engine_start_timeout_seconds=2"):
        bring_up()
    assert launcher.is_terminated


def test_answers_that_came_while_the_driver_was_stopped_are_not_too_late() -> None:
    def load(rank, _):
        rank.heartbeat = RankHeartbeat(5, 0)
        rank.channel.send(PhaseDone("weights"))
        rank.channel.send(rank.heartbeat)  # where this has arrived, the answer has

    def stopped() -> None:
        wait_until(lambda: [rank.num_steps for rank in group.ranks()] == [5, 5])
        clock.on_read = lambda: None
        clock.advance(1e6)

    clock = Clock()
    group, _ = make_group({0: {LoadWeights: load}, 1: {LoadWeights: load}}, clock=clock)
    group.connect(FakeStages())
    clock.on_read = stopped
    group.load()
    group.shutdown()


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"pagoda_version": "0.0.9"}, r"rank 1 of 2 \(host node-1, pid 101\) runs Pagoda 0.0.9 .* install the same"),
        ({"protocol_version": 0}, r"rank 1 .* \(protocol 0\)"),
    ],
)
def test_a_rank_of_another_version_is_refused_by_name(hello, message) -> None:
    group, launcher = make_group(hello=hello)
    with pytest.raises(ConfigError, match=message):
        group.connect(FakeStages())
    assert launcher.is_terminated


def test_ranks_with_other_models_are_refused_with_what_to_do() -> None:
    def prepared(rank, command):
        rank.right_answer(command)
        return RankPrepared(info=info_of(rank.rank, model_hash="xyz"), port=1, threads=1)

    group, launcher = make_group({1: {StartRank: prepared}})
    with pytest.raises(ConfigError, match=r"checkpoints .* differ: abc on rank 0 .*, xyz on rank 1 .*same model"):
        group.connect(FakeStages())
    assert launcher.is_terminated


def test_what_a_rank_says_of_its_own_end_is_passed_on_with_its_name() -> None:
    says = RankFailed(ErrorKind.INVALID_REQUEST, "there is no such file", False)
    group, _ = make_group({1: {LoadWeights: lambda *_: says}})
    group.connect(FakeStages())
    with pytest.raises(InvalidRequestError, match=r"rank 1 of 2 \(host node-1, pid 101\): there is no such file"):
        group.load()


def test_the_rank_that_could_not_reach_another_is_not_blamed_for_its_death() -> None:
    has_failed = threading.Event()

    def unreachable(rank, _):
        rank.channel.send(RankFailed(ErrorKind.INTERNAL, "connection reset by peer", True))
        has_failed.set()

    def dies_later(rank, _):
        has_failed.wait(SECONDS)
        rank.channel.close()

    # The clock stands still: however late the death shows, it comes within the time that it has.
    group, _ = make_group({0: {InitializeKV: unreachable}, 1: {InitializeKV: dies_later}}, clock=Clock())
    group.connect(FakeStages())
    with pytest.raises(EngineDeadError, match=r"rank 1 of 2 .* was killed by SIGKILL"):
        group.initialize_kv_cache(10)


# ---- steps --------------------------------------------------------------------------------------------------------


def test_results_of_steps_under_way_together_are_told_apart() -> None:
    with running_group(pipeline_parallel_size=2, tensor_parallel_size=1) as (group, _):
        assert group.max_concurrent_batches == 2
        first, second = group.submit(plan_of(1)), group.submit(plan_of(2, req_indices=3))
        assert first.result() == result_of(plan_of(1))
        assert second.result() == result_of(plan_of(2, req_indices=3))


def test_pipeline_stages_hear_of_sampled_tokens_with_the_next_plan() -> None:
    with running_group(pipeline_parallel_size=2, tensor_parallel_size=1) as (group, launcher):
        group.submit(plan_of(5)).result()
        group.submit(plan_of(6)).result()
        # The last stage has answered; the first one may not have looked yet.
        group.shutdown()
        assert launcher.ranks[0].is_over.wait(10)
        updates = [m.update for m in launcher.ranks[0].received if isinstance(m, RunStep)]
    assert updates[0].req_indices == []
    assert (updates[1].req_indices, updates[1].positions, updates[1].token_ids) == ([0], [6], [1005])


def test_a_step_that_fails_alike_on_all_ranks_fails_alone() -> None:
    with running_group({0: failing(1), 1: failing(1)}) as (group, _):
        with pytest.raises(RuntimeError, match="ValueError: no"):
            group.submit(plan_of(1)).result()
        group.check_health()
        assert group.submit(plan_of(2)).result() == result_of(plan_of(2))


def test_a_step_for_which_no_rank_has_memory_may_be_tried_smaller() -> None:
    lacking = failing(1, is_out_of_memory=True)
    with running_group({0: lacking, 1: lacking}) as (group, _):
        with pytest.raises(MemoryError) as caught:
            group.submit(plan_of(1)).result()
        assert is_out_of_memory(caught.value)
        group.check_health()


def test_a_step_that_fails_on_one_rank_only_loses_the_group_and_names_the_rank() -> None:
    behaviours, clock = {1: failing(1, error="MemoryError: none left", is_out_of_memory=True)}, Clock()
    with running_group(behaviours, clock=clock) as (group, launcher):
        launcher.ranks[0].is_sampling_rank = False  # it waits in a collective for the rank that failed
        clock.on_read = lambda: clock.advance(1.0)
        with pytest.raises(EngineDeadError, match=r"rank 1 of 2 \(host node-1.* failed step 1.*MemoryError: none left"):
            group.submit(plan_of(1)).result()
        assert launcher.is_terminated
        with pytest.raises(EngineDeadError, match="rank 1"):
            group.check_health()
        with pytest.raises(EngineDeadError, match="rank 1"):
            group.submit(plan_of(2)).result()


def test_ranks_that_failed_in_the_middle_of_their_collectives_are_lost_even_if_all_did() -> None:
    out_of_step = failing(1, is_out_of_step=True)
    with running_group({0: out_of_step, 1: out_of_step}) as (group, _), pytest.raises(EngineDeadError, match="step 1"):
        group.submit(plan_of(1)).result()


def test_a_killed_rank_is_blamed_before_those_that_missed_it() -> None:
    has_failed = threading.Event()

    def missed(rank, _):
        rank.channel.send(failed(1, error="CommunicationError: reset", is_communication=True, is_out_of_step=True))
        has_failed.set()

    def killed(rank, _):
        has_failed.wait(SECONDS)
        rank.channel.close()

    blamed = r"rank 1 of 2 \(host node-1, pid 101\) was killed by SIGKILL"
    with (
        running_group({0: {RunStep: missed}, 1: {RunStep: killed}}, clock=Clock()) as (group, _),
        pytest.raises(EngineDeadError, match=blamed),
    ):
        group.submit(plan_of(1)).result()


def test_a_stopped_rank_is_lost_after_the_heartbeat_timeout() -> None:
    clock = Clock()
    with running_group({1: {RunStep: nothing}}, clock=clock, rank_heartbeat_timeout_seconds=3) as (group, launcher):
        launcher.ranks[0].is_sampling_rank = False
        launcher.ranks[1].heartbeats.stop()
        time_passes_with_a_heartbeat_of(0, clock, group, launcher)
        with pytest.raises(
            EngineDeadError, match=r"no heartbeat from rank 1 .*timeout 3 s by rank_heartbeat_timeout_seconds"
        ):
            group.submit(plan_of(1)).result()


def test_a_step_that_hangs_is_lost_after_the_collective_timeout_and_names_who_is_behind() -> None:
    clock = Clock()
    with running_group(clock=clock, collective_timeout_seconds=3) as (group, launcher):
        launcher.ranks[0].is_sampling_rank = False
        launcher.ranks[0].heartbeat = RankHeartbeat(7, 0)
        launcher.ranks[1].heartbeat = RankHeartbeat(6, 0)
        wait_until(lambda: [rank.num_steps for rank in group.ranks()] == [7, 6])
        clock.on_read = lambda: clock.advance(1.0)
        with pytest.raises(EngineDeadError, match=r"step 1 with 1 tokens was not done .*: the others wait for rank 1"):
            group.submit(plan_of(1)).result()


def test_the_death_of_an_idle_rank_shows_at_the_next_look() -> None:
    with running_group() as (group, launcher):
        group.check_health()
        launcher.ranks[1].channel.close()
        with pytest.raises(EngineDeadError, match=r"rank 1 .* was killed"):
            wait_until(group.check_health)


def test_results_of_steps_that_were_given_up_are_not_mixed_up_with_later_ones() -> None:
    behaviour = failing(1)
    with running_group({0: behaviour, 1: behaviour}, pipeline_parallel_size=2, tensor_parallel_size=1) as (group, _):
        first = group.submit(plan_of(1))
        group.submit(plan_of(2))  # the engine drops it when the first one has failed
        with pytest.raises(RuntimeError, match="ValueError: no"):
            first.result()
        assert group.submit(plan_of(3)).result() == result_of(plan_of(3))
        group.check_health()


def test_health_lists_the_ranks_with_their_hosts_and_heartbeats() -> None:
    with running_group() as (group, _):
        ranks = group.ranks()
        assert [(rank.rank, rank.host, rank.pid) for rank in ranks] == [(0, "node-0", 100), (1, "node-1", 101)]
        assert all(time.monotonic() - rank.last_heartbeat < 60 for rank in ranks)


def test_shutdown_tells_the_ranks_and_may_come_twice() -> None:
    with running_group() as (group, launcher):
        group.shutdown()
        group.shutdown()
        assert all(rank.is_over.wait(10) for rank in launcher.ranks)
        with pytest.raises(EngineDeadError, match="shut down"):
            group.check_health()


# ---- kernels ------------------------------------------------------------------------------------------------------


def test_kernels_of_all_ranks_come_in_the_time_of_the_core() -> None:
    ahead = 1000.0  # so much has the other machine been up longer

    def record(rank, command):
        if command.most:
            kernel = TracedKernel("mm", time.monotonic() + ahead, 0.5, 7, rank=rank.rank)
            return KernelsRecorded([kernel], 3, time.time() - time.monotonic() - ahead)
        return None

    with running_group({0: {RecordKernels: record}, 1: {RecordKernels: record}}) as (group, launcher):
        begun = time.monotonic()
        kernels = group.record_kernels()
        taken = []

        def are_there() -> bool:
            group.check_health()  # which reads messages
            taken.append(kernels.take(time.monotonic(), is_idle=True))
            return sum(len(found) for found, _ in taken) == 2

        wait_until(are_there)
        found = [one for of_one, _ in taken for one in of_one]
        assert sorted(one.rank for one in found) == [0, 1]
        assert all(abs(one.started - begun) < 60 for one in found)
        assert sum(num_lost for _, num_lost in taken) == 6
        kernels.close()
        wait_until(lambda: all(RecordKernels(0) in rank.received for rank in launcher.ranks))
