"""The comparison with other engines: the worker's protocol, with Pagoda in it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.append(str(PEERS))

from harness.engine import EngineSettings  # noqa: E402
from harness.measure import Case  # noqa: E402
from harness.process import Worker, WorkerFailedError  # noqa: E402
from tests.support.checkpoints import shared_checkpoint  # noqa: E402
from tests.support.waiting import wait_until  # noqa: E402


def case(**values) -> Case:
    given = {"kind": "batch", "batch_size": 2, "input_tokens": 8, "output_tokens": 3, "vocab_size": 512, "seed": 1}
    return Case(**{**given, **values})


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
        alone = worker.run(case(batch_size=1, output_tokens=4))
        batch = worker.run(case(batch_size=3, output_tokens=4))
        assert len(alone["first_ids"]) == 4
        assert batch["first_ids"] == alone["first_ids"]  # the same first prompt: the seed makes it
        online = worker.run(case(kind="arrivals", offsets=(0.0, 0.2)))
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
