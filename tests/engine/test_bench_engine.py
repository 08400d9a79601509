"""`pagoda bench latency` and `throughput`: the engine in this process."""

from __future__ import annotations

import json

import pytest

from pagoda.cli.main import main
from tests.support.checkpoints import shared_checkpoint


@pytest.fixture
def engine() -> list[str]:
    return [
        "--model",
        str(shared_checkpoint()),
        "--threads",
        "1",
        "--dtype",
        "float32",
        "--kv-cache-memory-bytes",
        "4MiB",
    ]


def test_latency_times_prefill_and_each_step_for_every_batch_size(engine, tmp_path, capsys):
    path = tmp_path / "result.json"
    options = ["--batch-size", "1", "3", "--input-len", "20", "--output-len", "6", "--num-iters", "2"]
    assert main(["bench", "latency", *engine, *options, "--json", str(path)]) == 0
    assert "decode" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [row["batch_size"] for row in report["results"]] == [1, 3]
    for row in report["results"]:
        assert row["step_ms_p50"] <= row["step_ms_p99"]
        assert row["prefill_ms_p50"] + 5 * row["step_ms"]["mean"] == pytest.approx(row["total_ms"]["mean"], rel=0.5)
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch_size"] * 1000 / row["step_ms_p50"])
    assert report["arguments"]["output_len"] == 6
    assert report["settings"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input-len", "600"], "more than the model's"),
        (["--batch-size", "4097"], "sequences at once"),
        (["--batch-size", "40", "--input-len", "400", "--max-num-seqs", "64"], "KV blocks"),
    ],
)
def test_latency_refuses_what_cannot_run_as_one_batch(engine, options, said, capsys):
    assert main(["bench", "latency", *engine, *options]) == 2
    assert said in capsys.readouterr().err


def throughput(engine, path, *options):
    assert main(["bench", "throughput", *engine, "--num-prompts", "4", "--json", str(path), *options]) == 0
    return json.loads(path.read_text())["results"]


def test_throughput_counts_every_token_of_the_workload(engine, tmp_path):
    results = throughput(engine, tmp_path / "a.json", "--input-len", "20", "--output-len", "5")
    assert (results["requests"], results["prompt_tokens"], results["output_tokens"]) == (4, 80, 20)
    assert results["requests_per_second"] == pytest.approx(4 / results["seconds"])


def test_throughput_of_conversations_grows_the_history_and_finds_it_cached(engine, tmp_path):
    options = ["--workload", "multi-turn", "--num-turns", "3", "--input-len", "16", "--output-len", "16"]
    results = throughput(engine, tmp_path / "b.json", *options)
    assert results["requests"] == 12
    assert results["prompt_tokens"] == 4 * (16 + 48 + 80)
    assert results["cached_share"] > 0.4


def test_an_agents_turns_are_mostly_cached(engine, tmp_path):
    lengths = ["--prefix-len", "96", "--input-len", "8", "--output-len", "2", "--num-turns", "4"]
    options = ["--workload", "agent", "--num-prefixes", "1", *lengths, "--block-size", "8"]
    results = throughput(engine, tmp_path / "e.json", *options)
    assert results["requests"] == 16
    assert results["cached_share_of_later_turns"] > 0.8
    assert results["cached_share_of_later_turns"] > results["cached_share"]


def test_prefix_caching_shows_in_a_workload_of_shared_prefixes(engine, tmp_path):
    options = ["--workload", "shared-prefix", "--num-prefixes", "1", "--prefix-len", "64", "--input-len", "8"]
    with_cache = throughput(engine, tmp_path / "c.json", *options, "--output-len", "4", "--max-num-seqs", "1")
    assert with_cache["cached_share"] == pytest.approx(3 * 64 / (4 * 72))
    without = throughput(engine, tmp_path / "d.json", *options, "--output-len", "4", "--no-enable-prefix-caching")
    assert without["cached_share"] == 0


def test_acceptance_length_is_shown_with_speculative_decoding(engine, tmp_path, capsys):
    path = tmp_path / "result.json"
    speculation = ["--speculative-config", '{"method": "ngram", "prompt_lookup_min": 1}']
    options = ["--batch-size", "1", "--input-len", "20", "--output-len", "60", "--num-iters", "2", "--json", str(path)]
    assert main(["bench", "latency", *engine, *speculation, *options]) == 0
    assert "accept" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["results"]
    assert row["acceptance_length"] is None or row["acceptance_length"] >= 1
