"""Metrics: vLLM's names and meaning, each accepted request counted once, gauges of the moment, bounded series."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineReady, EngineStats
from pagoda.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineNotReadyError,
    ErrorKind,
    InvalidRequestError,
    QueueFullError,
)
from pagoda.parallel.rank_health import RankHealth
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import ExpertLoad
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.metrics.request_meter import RequestMeter
from pagoda.text.output import GenerationChunk

NAMES_READ_BY_AUTOSCALERS_AND_DASHBOARDS = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "iteration_tokens_total_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_params_max_tokens_bucket",
    "request_aborts_total",
    "runaways_total",
    "engine_restarts_total",
    "request_errors_total",
    "engine_state",
    "engine_state_transitions_total",
    "engine_seconds_since_progress",
}


class Clock:
    """Time that moves when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Health:
    state: str = "ready"
    transitions: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def shown_state(self) -> str:
        return self.state


@dataclass
class Engine:
    stats: EngineStats = field(default_factory=EngineStats)
    health: Health = field(default_factory=Health)
    heartbeat: EngineHeartbeat | None = None
    ranks: list[RankHealth] = field(default_factory=list)
    replicas: tuple[Engine, ...] = ()
    ready: EngineReady | None = None
    num_replays: int = 0
    sleep_level: int = 0


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of the exposition, `name{label=value,...}` without `model_name`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            suffix = "{" + ",".join(f"{name}={value}" for name, value in sorted(labels.items())) + "}" if labels else ""
            found[sample.name + suffix] = sample.value
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("demo")


def begin(metrics: Metrics, clock: Clock, arrival: float = 100.0, **sampling: int) -> RequestMeter:
    return RequestMeter(metrics, SamplingParams(**sampling), arrival, clock)


def first_chunk(ids: list[int], index: int = 0, scheduled: float = 100.5, **more: object) -> GenerationChunk:
    return GenerationChunk(index=index, token_ids=ids, num_prompt_tokens=7, scheduled_time=scheduled, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["pagoda_", "vllm:"])
def test_all_names_are_there_from_the_start_with_the_prefix_and_the_model(prefix: str) -> None:
    metrics = Metrics("my model", prefix)
    metrics.watch(Engine())
    names = set()
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                assert sample.labels["model_name"] == "my model"
                names.add(sample.name.removeprefix(prefix))
    assert names >= NAMES_READ_BY_AUTOSCALERS_AND_DASHBOARDS


def test_label_values_are_fixed_lists() -> None:
    metrics = Metrics("demo")
    metrics.watch(Engine())
    values: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            for label in ("finished_reason", "kind", "state", "from", "to"):
                values.setdefault(label, set()).update({sample.labels[label]} if label in sample.labels else ())
    states = {"starting", "ready", "degraded", "draining", "dead", "unloaded", "sleeping"}
    assert values == {
        "finished_reason": {"stop", "length", "repetition", "abort", "error"},
        "kind": set(ErrorKind),
        "state": states,
        "from": states,
        "to": states,
    }


def test_times_and_tokens_of_one_request_are_exact(metrics: Metrics, clock: Clock) -> None:
    meter = begin(metrics, clock, arrival=100.0, max_tokens=20)
    clock.now = 102.0
    meter.on_chunk(first_chunk([1], scheduled=100.5))
    clock.now = 102.5
    meter.on_chunk(GenerationChunk(token_ids=[2]))
    clock.now = 103.5
    meter.on_chunk(GenerationChunk(token_ids=[3, 4]))
    clock.now = 104.0
    meter.on_chunk(GenerationChunk(text="held back", finish_reason=FinishReason.STOP))
    meter.on_end(None)
    found = samples(metrics)
    expected = {
        "prompt_tokens_total": 7,
        "generation_tokens_total": 4,
        "time_to_first_token_seconds_sum": 2.0,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_sum": 1.5,
        "inter_token_latency_seconds_count": 3,
        "e2e_request_latency_seconds_sum": 4.0,
        "request_queue_time_seconds_sum": 0.5,
        "request_inference_time_seconds_sum": 3.5,
        "request_prefill_time_seconds_sum": 1.5,
        "request_decode_time_seconds_sum": 1.5,
        "request_prompt_tokens_sum": 7,
        "request_generation_tokens_sum": 4,
        "request_params_max_tokens_sum": 20,
        "request_success_total{finished_reason=stop}": 1,
        "request_success_total{finished_reason=abort}": 0,
    }
    assert {name: found["pagoda_" + name] for name in expected} == expected


@pytest.mark.parametrize(
    ("error", "reason", "cause"),
    [
        (asyncio.CancelledError(), "abort", "client"),
        (GeneratorExit(), "abort", "client"),
        (DeadlineExceededError("late"), "abort", "deadline"),
        (EngineDeadError("gone"), "error", None),
        (RuntimeError("bug"), "error", None),
    ],
)
def test_a_request_that_is_cut_off_is_counted_once_with_its_reason(
    metrics: Metrics, clock: Clock, error: BaseException, reason: str, cause: str | None
) -> None:
    for is_started in (True, False):
        meter = begin(metrics, clock)
        if is_started:
            meter.on_chunk(first_chunk([1]))
        meter.on_end(error)
    found = samples(metrics)
    assert found[f"pagoda_request_success_total{{finished_reason={reason}}}"] == 2
    assert found["pagoda_e2e_request_latency_seconds_count"] == 2
    for name in ("client", "deadline", "server"):
        assert found[f"pagoda_request_aborts_total{{cause={name}}}"] == (2 if name == cause else 0)


def test_a_request_that_the_end_of_the_grace_period_cuts_off_is_an_abort_by_the_server(
    metrics: Metrics, clock: Clock
) -> None:
    meter = begin(metrics, clock)
    meter.on_chunk(first_chunk([1]))
    meter.on_end(EngineNotReadyError("shutting down"))
    found = samples(metrics)
    assert found["pagoda_request_success_total{finished_reason=abort}"] == 1
    assert found["pagoda_request_aborts_total{cause=server}"] == 1


@pytest.mark.parametrize("error", [InvalidRequestError("no"), QueueFullError("full")])
def test_a_refused_request_is_no_request(metrics: Metrics, clock: Clock, error: Exception) -> None:
    begin(metrics, clock, n=3).on_end(error)
    found = samples(metrics)
    assert found["pagoda_e2e_request_latency_seconds_count"] == 0
    assert sum(value for name, value in found.items() if name.startswith("pagoda_request_success_total")) == 0


def test_each_sequence_of_a_request_counts_and_the_unfinished_ones_end_with_it(metrics: Metrics, clock: Clock) -> None:
    meter = begin(metrics, clock, n=3, max_tokens=5)
    meter.on_chunk(first_chunk([1, 2], index=0, finish_reason=FinishReason.LENGTH))
    meter.on_chunk(first_chunk([1], index=2))
    meter.on_end(asyncio.CancelledError())
    found = samples(metrics)
    assert found["pagoda_request_success_total{finished_reason=length}"] == 1
    assert found["pagoda_request_success_total{finished_reason=abort}"] == 2
    assert found["pagoda_prompt_tokens_total"] == 14


def test_max_tokens_is_observed_only_where_it_was_given(metrics: Metrics, clock: Clock) -> None:
    for sampling in ({}, {"max_tokens": 9}):
        meter = begin(metrics, clock, **sampling)
        meter.on_chunk(first_chunk([1], finish_reason=FinishReason.LENGTH))
        meter.on_end(None)
    assert samples(metrics)["pagoda_request_params_max_tokens_count"] == 1
    assert samples(metrics)["pagoda_request_params_max_tokens_sum"] == 9


def test_gauges_follow_the_engine_and_are_zero_when_it_is_dead(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    engine.stats = EngineStats(num_running=3, num_waiting=5, num_blocks=100, num_blocks_in_use=25)
    found = samples(metrics)
    assert found["pagoda_num_requests_running"] == 3
    assert found["pagoda_num_requests_waiting"] == 5
    assert found["pagoda_kv_cache_usage_perc"] == 0.25
    assert found["pagoda_engine_state{state=ready}"] == 1
    engine.health.state = "dead"
    found = samples(metrics)
    assert found["pagoda_num_requests_running"] == found["pagoda_num_requests_waiting"] == 0
    assert found["pagoda_kv_cache_usage_perc"] == 0
    states = {name: value for name, value in found.items() if name.startswith("pagoda_engine_state{")}
    assert sum(states.values()) == 1
    assert states["pagoda_engine_state{state=dead}"] == 1


def test_counts_of_the_engine_keep_rising_over_a_restart(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    engine.stats = EngineStats(
        prefix_cache_queries=10,
        prefix_cache_hits=4,
        prefix_cache_misses={"new": 6},
        num_preemptions=2,
        num_repetitions=1,
    )
    engine.health.transitions = {("starting", "ready"): 2, ("ready", "starting"): 1}
    assert samples(metrics)["pagoda_prefix_cache_queries_total"] == 10
    engine.stats = EngineStats(
        prefix_cache_queries=3, prefix_cache_hits=1, prefix_cache_misses={"new": 2}, num_preemptions=0
    )
    found = samples(metrics)
    assert found["pagoda_prefix_cache_queries_total"] == 13
    assert found["pagoda_prefix_cache_hits_total"] == 5
    assert found["pagoda_prefix_cache_misses_total{reason=new}"] == 8
    assert found["pagoda_num_preemptions_total"] == 2
    assert found["pagoda_runaways_total"] == 1
    assert found["pagoda_engine_restarts_total"] == 1
    assert found["pagoda_engine_state_transitions_total{from=starting,to=ready}"] == 2
    assert found["pagoda_engine_state_transitions_total{from=ready,to=dead}"] == 0


def test_expert_load_of_a_mixture_is_shown_once_it_was_measured(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    assert not any("moe" in name for name in samples(metrics))
    engine.stats = EngineStats(
        expert_load=ExpertLoad(imbalance=2.5, worst_imbalance=4.0, idle_share=0.25, rank_imbalance=1.5)
    )
    found = {name: value for name, value in samples(metrics).items() if "moe" in name}
    assert found == {
        "pagoda_moe_expert_imbalance": 2.5,
        "pagoda_moe_expert_imbalance_worst": 4.0,
        "pagoda_moe_experts_idle": 0.25,
        "pagoda_moe_rank_imbalance": 1.5,
    }


def test_the_age_of_the_last_sign_of_life_is_shown(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    assert samples(metrics)["pagoda_engine_seconds_since_progress"] == 0
    engine.heartbeat = EngineHeartbeat(1, time.monotonic() - 5, 0, is_busy=False)
    assert 5 <= samples(metrics)["pagoda_engine_seconds_since_progress"] < 60


def test_each_rank_shows_whether_it_is_up_and_how_old_its_last_heartbeat_is(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    assert not any("rank" in name for name in samples(metrics))
    engine.ranks = [
        RankHealth(rank=0, host="a", pid=1, last_heartbeat=time.monotonic() - 3, num_steps=9),
        RankHealth(rank=1, host="b", pid=2, last_heartbeat=time.monotonic() - 20, num_steps=8, is_up=False),
    ]
    found = samples(metrics)
    assert found["pagoda_rank_up{host=a,rank=0}"] == 1
    assert found["pagoda_rank_up{host=b,rank=1}"] == 0
    assert 3 <= found["pagoda_rank_seconds_since_heartbeat{host=a,rank=0}"] < 20
    assert 20 <= found["pagoda_rank_seconds_since_heartbeat{host=b,rank=1}"] < 100


def test_replicas_are_shown_one_by_one_and_their_counts_go_on_when_one_begins_anew(metrics: Metrics) -> None:
    whole, left, right = Engine(), Engine(), Engine()
    whole.replicas = (left, right)
    metrics.watch(whole)
    left.stats = EngineStats(step=10, num_running=1, num_scheduled_tokens=20, prefix_cache_hits=5, num_blocks=1)
    right.stats = EngineStats(step=2, num_running=2, num_scheduled_tokens=30, prefix_cache_hits=7)
    found = samples(metrics)
    assert found["pagoda_prefix_cache_hits_total"] == 12
    assert found["pagoda_replica_prefix_cache_hits_total{replica=0}"] == 5
    assert found["pagoda_replica_num_requests_running{replica=1}"] == 2
    assert found["pagoda_iteration_tokens_total_count"] == 12
    right.health = Health("starting", {("ready", "starting"): 1})
    right.stats = EngineStats()
    assert samples(metrics)["pagoda_prefix_cache_hits_total"] == 12
    right.stats = EngineStats(step=1, num_scheduled_tokens=3, prefix_cache_hits=1)
    found = samples(metrics)
    assert found["pagoda_prefix_cache_hits_total"] == 13
    assert found["pagoda_iteration_tokens_total_count"] == 13
    assert found["pagoda_engine_restarts_total"] == found["pagoda_replica_restarts_total{replica=1}"] == 1
    assert found["pagoda_replica_up{replica=1}"] == 0


def test_tokens_of_every_step_are_counted_even_when_reports_are_skipped(metrics: Metrics) -> None:
    engine = Engine()
    metrics.watch(engine)
    engine.stats = EngineStats(step=1, num_scheduled_tokens=100)
    metrics.observe_steps()
    metrics.observe_steps()
    engine.stats = EngineStats(step=4, num_scheduled_tokens=106)
    found = samples(metrics)
    assert found["pagoda_iteration_tokens_total_count"] == 4
    assert found["pagoda_iteration_tokens_total_sum"] == 106
    assert found["pagoda_iteration_tokens_total_bucket{le=8.0}"] == 3
    engine.stats = EngineStats()
    metrics.observe_steps()
    engine.stats = EngineStats(step=1, num_scheduled_tokens=5)
    assert samples(metrics)["pagoda_iteration_tokens_total_sum"] == 111


def test_error_answers_are_counted_by_kind(metrics: Metrics) -> None:
    metrics.count_error(ErrorKind.QUEUE_FULL)
    assert samples(metrics)["pagoda_request_errors_total{kind=queue_full}"] == 1


def test_the_number_of_series_does_not_grow_with_traffic(metrics: Metrics, clock: Clock) -> None:
    metrics.watch(Engine())
    before = len(samples(metrics))
    for number in range(50):
        meter = begin(metrics, clock, max_tokens=number + 1)
        meter.on_chunk(first_chunk([number], finish_reason=FinishReason.STOP))
        meter.on_end(None)
        metrics.count_error(ErrorKind.INVALID_REQUEST)
    assert len(samples(metrics)) == before


def test_openmetrics_is_given_to_who_asks_for_it(metrics: Metrics) -> None:
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert metrics.render("text/html")[1].startswith("text/plain")


def test_two_servers_in_one_process_do_not_share_series() -> None:
    one, two = Metrics("a"), Metrics("b")
    one.count_error(ErrorKind.INTERNAL)
    assert samples(two)["pagoda_request_errors_total{kind=internal}"] == 0


def test_vllms_metrics_are_shown_under_its_names_too(metrics: Metrics, clock: Clock) -> None:
    engine = Engine(EngineStats(num_running=3, num_waiting=2, num_blocks=8, num_blocks_in_use=2))
    metrics.watch(engine)  # type: ignore[arg-type]
    meter = begin(metrics, clock, max_tokens=20)
    meter.on_chunk(first_chunk([1, 2], finish_reason=FinishReason.STOP))
    found = samples(metrics)
    # What llm-d's endpoint picker reads.
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert not any(name.startswith("vllm:cache_config_info") for name in found)
    engine.ready = EngineReady(
        max_model_len=10, max_num_seqs=1, max_num_batched_tokens=10, num_blocks=77, block_size=16, vocab_size=5
    )
    found = samples(metrics)
    assert found["vllm:cache_config_info{block_size=16,num_gpu_blocks=77}"] == 1
    ours = {name.removeprefix("pagoda_"): value for name, value in found.items() if name.startswith("pagoda_")}
    theirs = {name.removeprefix("vllm:"): value for name, value in found.items() if name.startswith("vllm:")}
    assert {name: ours[name] for name in theirs} == theirs
    of_pagoda = {name.partition("{")[0] for name in ours.keys() - theirs.keys()}
    assert not of_pagoda & {
        name
        for name in NAMES_READ_BY_AUTOSCALERS_AND_DASHBOARDS
        if not name.startswith(("engine_", "run", "request_a"))
    } - {"request_errors_total"}


def test_names_are_there_once_where_that_is_asked_for() -> None:
    for metrics in (Metrics("demo", "vllm:"), Metrics("demo", vllm_names=False)):
        metrics.watch(Engine())  # type: ignore[arg-type]
        families = [family.name for family in text_string_to_metric_families(metrics.render()[0].decode())]
        assert len(families) == len(set(families))
        assert sum("num_requests_running" in name for name in families) == 1
