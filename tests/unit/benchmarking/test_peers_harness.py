"""The comparison with other engines: rounds, ratios, figures of a batch, and the worker's protocol with Pagoda in it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[3] / "benchmarks" / "peers"
sys.path.append(str(PEERS))

from harness.engine import EngineSettings, Event  # noqa: E402
from harness.measure import Case, batch_figures, quantile  # noqa: E402
from harness.pairing import WARM_UP_ROUND, median_ratio, run_rounds  # noqa: E402
from harness.process import Worker, WorkerFailedError  # noqa: E402
from harness.results import Results  # noqa: E402
from harness.rows import MAIN_ROWS, online_case, rows  # noqa: E402
from tests.support.checkpoints import shared_checkpoint  # noqa: E402
from tests.support.waiting import wait_until  # noqa: E402

HEAD = {
    "time": "now",
    "commit": "c",
    "cpu": {"name": "x", "instruction_sets": []},
    "threads": 2,
    "pairs": 2,
    "limits": {"read_gb_per_second_1_threads": 30.0},
}


def case(**values) -> Case:
    given = {"kind": "batch", "batch_size": 2, "input_tokens": 8, "output_tokens": 3, "vocab_size": 100, "seed": 1}
    return Case(**{**given, **values})


def test_each_round_runs_every_engine_once_and_begins_with_the_next():
    order = []

    def run(engine, number):
        order.append((engine, number))
        return {"speed": 1.0}

    run_rounds(["a", "b", "c"], run, 3, figure="speed")
    rounds = [[engine for engine, number in order if number == wanted] for wanted in (WARM_UP_ROUND, 0, 1, 2)]
    assert rounds == [["a", "b", "c"], ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_ratios_are_taken_within_rounds_so_that_a_slow_machine_cancels_out():
    # The machine halves its speed in the second round and gives one engine a hiccup in the third.
    own, other = [100.0, 50.0, 100.0, 60.0, 100.0], [50.0, 25.0, 10.0, 30.0, 50.0]
    assert median_ratio(own, other, higher_is_better=True) == 2.0
    assert median_ratio(own, other, higher_is_better=False) == 0.5
    assert median_ratio(own, [], higher_is_better=True) is None


def test_an_engine_far_behind_is_run_once_and_kept_out_of_the_rounds():
    speeds = {"pagoda": 1.0, "fast": 10.0, "slow": 2.0}
    rounds = run_rounds(
        list(speeds), lambda engine, _: {"speed": speeds[engine]}, 2, figure="speed", slowest=3, keep=("pagoda",)
    )
    assert rounds.figures.keys() == {"pagoda", "fast"}
    assert rounds.median("slow", "speed") == 2.0
    assert rounds.values("slow", "speed") == []


def test_an_engine_that_fails_is_named_and_the_others_go_on():
    def run(engine, number):
        if engine == "b" and number == 1:
            raise WorkerFailedError("out of memory")
        return {"speed": 1.0}

    rounds = run_rounds(["a", "b"], run, 3, figure="speed")
    assert rounds.failures == {"b": "out of memory"}
    assert len(rounds.figures["a"]) == 3
    assert "b" not in rounds.figures


def test_prefill_ends_with_the_last_first_token_and_decode_with_the_first_sequence():
    events = [
        Event(10.0, {}),
        Event(11.0, {0: [5]}),
        Event(12.0, {0: [6], 1: [7]}),  # everyone has a token: 16 prompt tokens in two seconds
        Event(12.5, {0: [8], 1: [9]}),  # the first sequence is done: two tokens in half a second
        Event(14.0, {1: [4]}),
    ]
    figures = batch_figures(events, case())
    assert figures["prefill_tokens_per_second"] == 8.0
    assert figures["decode_tokens_per_second"] == 4.0
    assert figures["requests_per_second"] == 0.5
    assert figures["first_ids"] == [5, 6, 8]


def test_a_sequence_that_ends_early_is_no_result():
    with pytest.raises(RuntimeError, match="another length"):
        batch_figures([Event(0.0, {}), Event(1.0, {0: [1, 2, 3], 1: [1]})], case())


def test_prompts_follow_from_the_seed_and_share_what_they_should():
    assert case().prompts() == case().prompts()
    assert case().prompts() != case(seed=2).prompts()
    shared = case(batch_size=4, shared_tokens=5, num_prefixes=2).prompts()
    assert shared[0][:5] == shared[2][:5] != shared[1][:5] == shared[3][:5]
    assert {len(prompt) for prompt in shared} == {8}


def test_online_arrivals_have_the_rate_asked_for():
    arrivals = online_case(quick=False, rate=4.0, seed=1)
    assert len(arrivals.offsets) == arrivals.batch_size
    assert arrivals.offsets[-1] == pytest.approx(arrivals.batch_size / 4.0, rel=0.5)
    assert quantile([1.0, 2.0, 3.0], 0.75) == 2.5


def test_the_quick_form_has_the_same_rows():
    assert rows(quick=True).keys() == rows(quick=False).keys() >= set(MAIN_ROWS)


def test_every_row_is_written_at_once_with_ratio_and_goal(tmp_path):
    speeds = {"pagoda": 30.0, "vllm": 20.0, "openvino": 10.0}
    rounds = run_rounds(list(speeds), lambda engine, _: {"speed": speeds[engine]}, 2, figure="speed")
    results = Results(tmp_path / "deep" / "out", HEAD)
    results.add("qwen3-0.6b", "bf16", "decode-1", "speed", "tok/s", rounds, higher_is_better=True)
    table = (tmp_path / "deep" / "out.md").read_text()
    line = "| qwen3-0.6b bf16 decode-1, tok/s | 30 | 10 | 20 | vllm | 1.50 | ≥ 1.3 | reached |"
    assert line in table
    (row,) = json.loads((tmp_path / "deep" / "out.json").read_text())["rows"]
    assert (row["best_peer"], row["ratio"]) == ("vllm", 1.5)
    assert row["figures"]["openvino"]["values"] == [10.0, 10.0]


def test_the_result_says_how_many_tokens_agree_with_pagodas(tmp_path):
    ids = {"pagoda": [1, 2, 3], "vllm": [1, 2, 4], "openvino": [1, 2, 3]}
    rounds = run_rounds(list(ids), lambda engine, _: {"speed": 1.0, "first_ids": ids[engine]}, 1, figure="speed")
    results = Results(tmp_path / "out", HEAD)
    results.add("qwen3-0.6b", "fp32", "decode-1", "speed", "tok/s", rounds, higher_is_better=True)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {name: entry["agreeing_tokens"] for name, entry in row["figures"].items()} == {
        "pagoda": [3],
        "vllm": [2],
        "openvino": [3],
    }


@pytest.fixture
def settings() -> EngineSettings:
    return EngineSettings(
        model=str(shared_checkpoint()),
        converted="",
        weights="fp32",
        threads=1,
        max_num_seqs=4,
        max_model_len=64,
        kv_tokens=1024,
        kv_token_bytes=2 * 3 * 2 * 16 * 4,
        prefix_caching=True,
    )


def state_of(process_id: int) -> str:
    """The kernel's letter for what a process does: T when it is stopped."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_runs_batches_and_arrivals_and_is_stopped_in_between(settings, tmp_path):
    cores = sorted(os.sched_getaffinity(0))[:1]
    worker = Worker("pagoda", settings, cores, tmp_path / "log")
    try:
        worker.wait_until_ready()
        alone = worker.run(case(batch_size=1, vocab_size=512, output_tokens=4))
        batch = worker.run(case(batch_size=3, vocab_size=512, output_tokens=4))
        assert len(alone["first_ids"]) == 4
        assert batch["first_ids"] == alone["first_ids"]  # the same first prompt: the seed makes it
        online = worker.run(case(kind="arrivals", vocab_size=512, offsets=(0.0, 0.2)))
        assert online["ttft_p50_ms"] > 0
        wait_until(lambda: state_of(worker.process_id) == "T")
        with pytest.raises(WorkerFailedError, match="prompt"):
            worker.run(case(vocab_size=10**6))
    finally:
        worker.end()
    assert worker.peak_rss_bytes > 2**20


def test_a_worker_that_cannot_load_says_its_last_words(settings, tmp_path):
    missing = replace(settings, model=str(tmp_path / "not-there"))
    worker = Worker("pagoda", missing, sorted(os.sched_getaffinity(0))[:1], tmp_path / "log")
    with pytest.raises(WorkerFailedError, match="not-there"):
        worker.wait_until_ready()
