"""Several replicas as one engine: who gets a request, what becomes of one whose replica is lost, and what the whole says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.client.request_queue import QueuePlaces
from pagoda.engine.data_parallel import client as data_parallel
from pagoda.engine.data_parallel.client import DataParallelClient, create_engine_client, devices_of
from pagoda.engine.data_parallel.health import overall
from pagoda.engine.data_parallel.router import FIRST_TYPICAL_OUTPUT
from pagoda.engine.health import EngineHealth, EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineOutput, EngineReady, EngineStats
from pagoda.errors import (
    ConfigError,
    EngineDeadError,
    EngineNotReadyError,
    PagodaError,
    QueueFullError,
)
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from tests.support.fake_engine import FakeEngineClient
from tests.support.waiting import wait_until_async

READY, DEGRADED, STARTING = EngineState.READY, EngineState.DEGRADED, EngineState.STARTING
DRAINING, DEAD = EngineState.DRAINING, EngineState.DEAD


class FakeReplica(FakeEngineClient):
    """A fake engine in the place of a `ProcessEngineClient`. `refusal` is raised in place of the first output."""

    device = "cpu"

    def __init__(
        self, config: PagodaConfig, *, name: str, environment: Mapping[str, str], launched: PrelaunchedProcess | None
    ) -> None:
        super().__init__()
        self.health = EngineHealth(name)
        self.config = config
        self.environment = environment
        self.launched = launched
        self.pinned: int | None = None
        self.refusal: PagodaError | None = None
        self.loss: EngineDeadError | None = None
        self.sign: EngineHeartbeat | None = None

    @property
    def heartbeat(self) -> EngineHeartbeat | None:
        return self.sign

    def pin_num_blocks(self, num_blocks: int) -> None:
        self.pinned = num_blocks

    async def start(self) -> None:
        self._limits = EngineReady(
            max_model_len=128,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            num_blocks=100,
            block_size=16,
            vocab_size=512,
            device=self.device,
        )
        await super().start()

    async def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        if self.refusal is not None:
            raise self.refusal
        async for output in super().submit(request, places):
            if self.loss is not None:
                raise self.loss
            yield output

    async def _wait(self, request: EngineRequest, position: int) -> None:
        await super()._wait(request, position)
        if self.loss is not None:
            raise self.loss

    def lose(self, *, was_killed: bool) -> None:
        """The core is lost: what runs ends, and another one is on its way."""
        self.loss = EngineDeadError("the engine was lost", was_killed=was_killed)
        self.health.transition(STARTING, "lost")
        self.hold.set()

    def come_back(self) -> None:
        self.loss = None
        self.health.transition(READY, "another one")


@pytest.fixture(autouse=True)
def _fake_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "ProcessEngineClient", FakeReplica)


async def started(num_replicas: int = 2, **settings) -> tuple[DataParallelClient, list[FakeReplica]]:
    client = DataParallelClient(PagodaConfig(data_parallel_size=num_replicas, **settings))
    replicas: list[FakeReplica] = list(client.replicas)  # type: ignore[arg-type]
    await client.start()
    return client, replicas


def request(request_id: str = "r", prompt: list[int] | None = None, max_tokens: int = 3) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt or [1, 2, 3],
        params=SamplingParams(ignore_eos=True),
        max_tokens=max_tokens,
    )


async def run(client: DataParallelClient, what: EngineRequest) -> list[int]:
    tokens: list[int] = []
    reasons = []
    async for output in client.submit(what):
        tokens += output.new_token_ids
        reasons.append(output.finish_reason)
    assert reasons[-1] is FinishReason.LENGTH
    return tokens


def names_of(replica: FakeReplica) -> list[str]:
    return [submitted.request_id for submitted in replica.submitted]


def test_one_replica_is_the_engine_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(create_engine_client(PagodaConfig()), ProcessEngineClient)
    assert isinstance(create_engine_client(PagodaConfig(data_parallel_size=2)), DataParallelClient)


async def test_requests_are_spread_by_load_and_kept_together_by_prefix() -> None:
    client, (left, right) = await started()
    left.hold.clear()
    right.hold.clear()
    shared = list(range(100, 164))
    # The first is computed in full; the second has all but its own end of it cached there, which is worth the company.
    order = [request("a", [*shared, 1]), request("b", [5] * 65), request("a2", [*shared, 2]), request("b2", [5] * 66)]
    tasks = []
    for what in order:
        tasks.append(asyncio.create_task(run(client, what)))
        await asyncio.sleep(0)
    assert (names_of(left), names_of(right)) == (["a", "a2"], ["b", "b2"])
    left.hold.set()
    right.hold.set()
    assert [len(tokens) for tokens in await asyncio.gather(*tasks)] == [3] * 4


async def test_a_request_that_its_reader_ends_teaches_the_router_as_one_that_the_engine_ends() -> None:
    client, _ = await started()
    prompt = [7] * 16
    tokens: list[int] = []
    async with aclosing(client.submit(request("a", prompt, max_tokens=100))) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            tokens += output.new_token_ids
            if len(tokens) == 33:  # as the text layer does after a stop string
                break
    typical = client._router.typical_output
    assert typical < FIRST_TYPICAL_OUTPUT
    next_turn = client._router.place(request("b", prompt + tokens), [0])
    assert next_turn.num_cached_tokens == 48


async def test_an_abort_reaches_the_replica_that_has_the_request() -> None:
    client, (left, right) = await started()
    for replica in (left, right):
        replica.hold.clear()
    first, second = (asyncio.create_task(run(client, request(name))) for name in "ab")
    await wait_until_async(lambda: left.num_running == right.num_running == 1)
    second.cancel()
    await wait_until_async(lambda: right.aborted == ["b"])
    assert left.aborted == []
    left.hold.set()
    await first


async def test_a_request_whose_replica_is_killed_is_run_by_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client, (left, right) = await started()
    left.hold.clear()
    task = asyncio.create_task(run(client, request()))
    await wait_until_async(lambda: left.num_running == 1)
    left.lose(was_killed=True)
    assert await task == [1, 2, 3]
    assert names_of(right) == ["r"]
    assert "request r goes to replica 1: the engine was lost" in caplog.text


async def test_a_request_goes_on_behind_the_tokens_that_it_has_sent() -> None:
    client, (left, right) = await started()
    outputs = client.submit(request(max_tokens=50))
    first = await anext(outputs)
    left.lose(was_killed=True)
    rest = [output async for output in outputs]
    assert right.submitted[0].output_token_ids == first.new_token_ids
    assert len(first.new_token_ids) + sum(len(output.new_token_ids) for output in rest) == 50
    assert rest[-1].finish_reason is not None


async def test_a_request_that_makes_engines_fail_takes_two_of_them(caplog: pytest.LogCaptureFixture) -> None:
    client, replicas = await started(3)
    for replica in replicas:
        replica.refusal = EngineDeadError("the engine failed")
    with pytest.raises(EngineDeadError):
        await run(client, request("poison"))
    assert "request poison was running in 2 engines that failed" in caplog.text


async def test_a_request_whose_replicas_are_all_killed_waits_for_the_first_that_is_back() -> None:
    client, (left, right) = await started()
    left.hold.clear()
    right.hold.clear()
    task = asyncio.create_task(run(client, request()))
    await wait_until_async(lambda: left.num_running == 1)
    right.lose(was_killed=True)
    left.lose(was_killed=True)
    await wait_until_async(lambda: left.num_running == 0)
    await asyncio.sleep(0.05)
    assert not task.done()
    left.come_back()
    assert await task == [1, 2, 3]


async def test_a_full_replica_passes_requests_on_and_all_full_is_the_shortest_wait() -> None:
    client, (left, right) = await started()
    left.refusal = QueueFullError("full", 9)
    assert await run(client, request("a")) == [1, 2, 3]
    right.refusal = QueueFullError("full", 4)
    with pytest.raises(QueueFullError) as refused:
        await run(client, request("b"))
    assert refused.value.retry_after_seconds == 4


async def test_a_replica_that_is_not_there_gets_nothing_and_remembers_nothing_when_it_is_back() -> None:
    client, (left, right) = await started()
    prompt = [7] * 65
    await run(client, request("a", prompt))
    left.lose(was_killed=True)
    await run(client, request("b", prompt))
    left.come_back()
    assert (names_of(left), names_of(right)) == (["a"], ["b"])
    await run(client, request("c", prompt))
    assert names_of(right) == ["b", "c"]  # it has the prefix; the other's cache began anew


async def test_requests_without_any_replica_are_told_to_come_back() -> None:
    client, replicas = await started()
    for replica in replicas:
        replica.lose(was_killed=True)
    with pytest.raises(EngineNotReadyError):
        await run(client, request())


async def test_one_id_may_run_twice_at_once() -> None:
    client, (left, right) = await started()
    left.hold.clear()
    right.hold.clear()
    tasks = [asyncio.create_task(run(client, request("a", prompt))) for prompt in ([1] * 3, [2] * 3)]
    await wait_until_async(lambda: left.num_running + right.num_running == 2)
    left.hold.set()
    right.hold.set()
    assert await asyncio.gather(*tasks) == [[1] * 3, [2] * 3]


async def test_the_whole_follows_its_parts() -> None:
    client, (left, right) = await started()
    assert (client.health.state, client.health.cause) == (READY, "all 2 replicas are ready")
    left.lose(was_killed=True)
    assert (client.health.state, client.health.cause) == (DEGRADED, "engine replica 0 is starting: lost")
    right.lose(was_killed=True)
    assert client.health.state is STARTING
    right.come_back()
    assert client.health.state is DEGRADED
    left.come_back()
    assert client.health.state is READY
    left.health.transition(DEGRADED, "steps are smaller")
    assert client.health.state is DEGRADED
    left.health.transition(DEAD, "no more restarts")
    assert (client.health.state, client.health.cause) == (DEAD, "engine replica 0 is dead: no more restarts")
    with pytest.raises(EngineDeadError):
        await run(client, request())


async def test_draining_concerns_every_replica_and_lasts_until_none_is_left() -> None:
    client, (left, right) = await started()
    right.lose(was_killed=True)
    client.health.transition(DRAINING, "told to stop")
    assert (left.health.state, right.health.state) == (DRAINING, DRAINING)
    right.health.transition(DEAD, "lost")
    assert client.health.state is DRAINING
    left.health.transition(DEAD, "lost too")
    assert client.health.state is DEAD


async def test_the_first_start_is_over_when_all_replicas_are_there() -> None:
    client = DataParallelClient(PagodaConfig(data_parallel_size=2))
    client.health.hold("tokenizer")
    left, _ = client.replicas
    await left.start()
    assert client.health.state is STARTING
    left.health.transition(STARTING, "lost")
    left.health.enter_phase("weights", "40 %")
    assert (client.health.phase, client.health.detail) == ("weights", "replica 0 of 2 40 %")


def test_a_process_that_is_there_already_is_the_first_replicas() -> None:
    with PrelaunchedProcess() as launched:
        replicas = DataParallelClient(PagodaConfig(data_parallel_size=3), launched=launched).replicas
        assert [replica.launched for replica in replicas] == [launched, None, None]  # type: ignore[attr-defined]


async def test_a_replica_that_cannot_start_is_the_end() -> None:
    client = DataParallelClient(PagodaConfig(data_parallel_size=2))

    async def fail() -> None:
        client.replicas[1].health.transition(DEAD, "no memory")
        raise ConfigError("no memory")

    client.replicas[1].start = fail  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="no memory"):
        await client.start()
    assert client.health.state is DEAD


async def test_replicas_share_queue_and_memory_and_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    client, replicas = await started(3, max_num_waiting=100, tensor_parallel_size=2)
    assert [replica.config.max_num_waiting for replica in replicas] == [34] * 3
    assert [replica.pinned for replica in replicas] == [100] * 3
    assert [replica.environment["CUDA_VISIBLE_DEVICES"] for replica in replicas] == ["0,1", "2,3", "4,5"]
    assert devices_of(1, 2, "7,5,3,1") == "3,1"
    assert client.ready is not None
    assert (client.ready.max_num_seqs, client.ready.num_blocks, client.ready.max_model_len) == (48, 300, 128)


async def test_replicas_on_gpus_find_out_their_own_memory_and_none_falls_back_to_the_cpu() -> None:
    client = DataParallelClient(PagodaConfig(data_parallel_size=2))
    left, right = client.replicas
    left.device = "cuda"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"different devices \(cuda, cpu\)"):
        await client.start()
    assert left.pinned is None  # type: ignore[attr-defined]
    assert right.pinned is None  # type: ignore[attr-defined]


async def test_figures_are_sums_and_the_sign_of_life_is_the_oldest() -> None:
    client, (left, right) = await started()
    assert client.heartbeat is None
    left.stats = EngineStats(step=3, num_running=1, num_blocks=10, num_blocks_in_use=5, prefix_cache_hits=7)
    right.stats = EngineStats(step=4, num_running=2, num_blocks=10, num_blocks_in_use=0, degradation="small steps")
    left.sign = EngineHeartbeat(3, 50.0, 10, is_busy=True)
    right.sign = EngineHeartbeat(4, 40.0, 0, is_busy=False)
    stats = client.stats
    assert (stats.step, stats.num_running, stats.kv_cache_usage, stats.prefix_cache_hits) == (7, 3, 0.25, 7)
    assert stats.degradation == "small steps"
    assert client.heartbeat == EngineHeartbeat(7, 40.0, 10, is_busy=True)


async def test_shutting_down_is_expected_of_all() -> None:
    client, replicas = await started()
    await client.shutdown()
    assert client.health.transitions["ready", "dead"] == 1
    assert [replica.health.state for replica in replicas] == [DEAD, DEAD]


@pytest.mark.parametrize(
    ("current", "states", "expected"),
    [
        (STARTING, [READY, READY], READY),
        (READY, [READY, STARTING], DEGRADED),
        (READY, [STARTING, STARTING], STARTING),
        (READY, [DEGRADED, READY], DEGRADED),
        (READY, [READY, DEAD], DEAD),
        (DRAINING, [READY, DEAD], DRAINING),
        (DRAINING, [DEAD, DEAD], DEAD),
    ],
)
def test_one_state_of_several(current: EngineState, states: list[EngineState], expected: EngineState) -> None:
    replicas = []
    for index, state in enumerate(states):
        health = EngineHealth(f"replica {index}")
        health.transition(READY, "started")
        health.transition(state, "a test")
        replicas.append(health)
    assert overall(current, replicas)[0] is expected
