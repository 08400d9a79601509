"""Decode by captured steps. A recording that runs its step again stands in for CUDA's: everything around it is the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from pagoda.execution.cuda_graphs import MAX_GRAPHS, DecodeGraphs, graph_sizes, reserved_bytes
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.sampling.params import SamplingParams
from tests.support.plan_driver import PlanDriver, Sequence, make_executor
from tests.support.recording import Recording

PROMPTS = {"one": [7], "short": [5, 6, 7], "long": [(13 * n + 5) % 500 for n in range(40)], "last": [9] * 9}
NUM_OUTPUT = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dummy_checkpoint(
        tmp_path_factory.mktemp("graphs") / "model", DummySpec(num_layers=2, sliding_window=16)
    )


def outputs(checkpoint: Path, recording: Recording | None) -> tuple[list[Sequence], torch.Tensor]:
    executor = make_executor(checkpoint)
    runner = executor._worker.runner
    assert runner is not None
    if recording is not None:
        with torch.inference_mode():
            runner.capture_graphs(partial(DecodeGraphs, capture=recording))
    driver = PlanDriver(executor)
    sequences = [driver.add(name, prompt, SamplingParams(temperature=0.0)) for name, prompt in PROMPTS.items()]
    # One after the other they begin, so that batches of one to four rows decode, and mixed ones are between.
    for count in range(1, len(sequences) + 1):
        driver.run_to(3 * count, sequences[:count], chunk=7)
    for sequence in sequences[:2]:
        driver.release(sequence)
    driver.run_to(3 * len(sequences) + NUM_OUTPUT, sequences[2:])
    return sequences, torch.stack([key_cache[1:] for key_cache, _ in runner.kv_caches])


def test_captured_steps_give_the_same_tokens_and_keys(checkpoint: Path) -> None:
    recording = Recording()
    with_graphs, keys = outputs(checkpoint, recording)
    without, expected_keys = outputs(checkpoint, None)
    assert [s.output for s in with_graphs] == [s.output for s in without]
    # Padding wrote to the null block only.
    torch.testing.assert_close(keys, expected_keys, rtol=1e-4, atol=1e-4)
    assert recording.num_captured == len(graph_sizes(8))
    assert recording.num_replayed > NUM_OUTPUT


def test_batches_that_are_no_decode_or_too_large_run_without_a_graph(checkpoint: Path) -> None:
    executor = make_executor(checkpoint, max_num_seqs=8)
    runner = executor._worker.runner
    assert runner is not None
    recording = Recording()
    with torch.inference_mode():
        runner.graphs = DecodeGraphs(
            runner.model, runner.kv_caches, max_num_seqs=2, max_model_len=256, max_blocks=32, capture=recording
        )
    driver = PlanDriver(executor)
    sequences = [driver.add(name, prompt, SamplingParams(temperature=0.0)) for name, prompt in PROMPTS.items()]
    driver.step({s.name: len(s.prompt) for s in sequences}, sequences)
    driver.step({s.name: 1 for s in sequences}, sequences)
    assert recording.num_replayed == 0
    driver.step({s.name: 1 for s in sequences[:2]}, sequences)
    assert recording.num_replayed == 1


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 8, 100, 256, 384, 512, 4096])
def test_sizes_are_few_and_cover_the_batch(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= MAX_GRAPHS
    assert sizes[0] == 1
    assert sizes[-1] == min(max_num_seqs, 384) or sizes[-1] == max_num_seqs
    assert reserved_bytes(max_num_seqs, 1000) > sizes[-1] * 1000
