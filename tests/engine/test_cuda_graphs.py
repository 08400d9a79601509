"""Decode by captured steps. A recording that runs its step again stands in for CUDA's: everything around it is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagoda.errors import CommunicationError, ConfigError
from pagoda.execution.cuda_graphs import (
    MAX_GRAPHS,
    MAX_QUERY_LENS,
    MAX_VERIFYING_SIZES,
    Capture,
    DecodeGraphs,
    GraphSize,
    graph_sizes,
    reserved_bytes,
    uses_cuda_graphs,
)
from pagoda.models.dummy import DummySpec
from pagoda.parallel.groups import TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.engine.test_speculation import answers_of, make_core, speculate
from tests.support.checkpoints import shared_checkpoint
from tests.support.plan_driver import PlanDriver, Sequence, make_executor
from tests.support.recording import Recording

PROMPTS = {"one": [7], "short": [5, 6, 7], "long": [(13 * n + 5) % 500 for n in range(40)], "last": [9] * 9}
NUM_OUTPUT = 12


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint(DummySpec(num_layers=2, sliding_window=16))


def outputs(checkpoint: Path, recording: Recording | None) -> tuple[list[Sequence], torch.Tensor]:
    executor = make_executor(checkpoint)
    runner = executor.runner
    if recording is not None:
        runner.capture_graphs(recording)
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
    runner = executor.runner
    recording = Recording()
    with torch.inference_mode():
        runner.graphs = DecodeGraphs(
            runner.model, runner.kv_caches, sizes=graph_sizes(2), max_model_len=256, max_blocks=32, capture=recording
        )
    driver = PlanDriver(executor)
    sequences = [driver.add(name, prompt, SamplingParams(temperature=0.0)) for name, prompt in PROMPTS.items()]
    driver.step({s.name: len(s.prompt) for s in sequences}, sequences)
    driver.step({s.name: 1 for s in sequences}, sequences)
    assert recording.num_replayed == 0
    driver.step({s.name: 1 for s in sequences[:2]}, sequences)
    assert recording.num_replayed == 1


def test_steps_with_drafts_run_as_graphs_and_change_nothing(checkpoint: Path) -> None:
    """Rows of no, few and many drafts together, which are right, wrong, and right at first."""
    requests = [
        EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=temperature, seed=len(prompt), ignore_eos=True),
            max_tokens=40,
        )
        for (name, prompt), temperature in zip(PROMPTS.items(), (0.0, 0.9, 0.0, 0.7), strict=True)
    ]
    settings = {"max_num_seqs": 4, "max_model_len": 96, "num_gpu_blocks_override": 60}
    plain = answers_of(make_core(checkpoint, **settings), requests)
    core = make_core(checkpoint, **settings, speculative_config={"method": "ngram", "num_speculative_tokens": 8})
    speculate(core, plain, seed=5, share=1.0)
    recording = Recording()
    sizes = graph_sizes(4, 8, short_query_len=9, max_short_rows=4)
    core._executor.runner.capture_graphs(recording, sizes)
    assert answers_of(core, requests) == plain
    assert recording.num_captured == len(sizes)
    assert core.stats().num_spec_accepted_tokens > 20
    # All but those with a prompt of more tokens than a row of drafts has.
    assert recording.num_replayed >= core.stats().step - 3


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 8, 100, 256, 384, 512, 4096])
def test_sizes_are_few_and_cover_the_batch(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= MAX_GRAPHS
    assert sizes[0] == (1, 1)
    assert sizes[-1].num_tokens == min(max_num_seqs, 384) or sizes[-1].num_tokens == max_num_seqs
    assert reserved_bytes(sizes, 1000) > sizes[-1].num_tokens * 1000


@pytest.mark.parametrize("num_drafts", [1, 3, 16, 128])
@pytest.mark.parametrize(("short_query_len", "max_short_rows"), [(16, 16), (4, 64), (64, 4)])
def test_sizes_of_rows_with_drafts_are_few_and_what_attention_takes_as_short(
    num_drafts: int, short_query_len: int, max_short_rows: int
) -> None:
    plain = graph_sizes(256)
    sizes = graph_sizes(256, num_drafts, short_query_len=short_query_len, max_short_rows=max_short_rows)
    more = [size for size in sizes if size.query_len > 1]
    assert [size for size in sizes if size.query_len == 1] == plain
    assert 0 < len(more) <= MAX_QUERY_LENS * MAX_VERIFYING_SIZES
    assert all(size.num_rows <= max_short_rows and size.query_len <= short_query_len for size in more)
    assert max(size.query_len for size in more) == min(1 + num_drafts, short_query_len)
    assert graph_sizes(256, num_drafts) == plain


@pytest.mark.parametrize(
    ("device", "layout", "enforce_eager", "expected"),
    [
        ("cuda", (1, 1), False, True),
        ("cuda", (4, 1), False, True),  # NCCL's sums are captured
        ("cuda", (1, 2), False, False),  # the host sends from stage to stage
        ("cuda", (2, 2), False, False),
        ("cuda", (4, 1), True, False),
        ("cpu", (1, 1), False, False),
    ],
)
def test_steps_are_captured_where_no_host_is_in_them(
    device: str, layout: tuple[int, int], enforce_eager: bool, expected: bool
) -> None:
    assert uses_cuda_graphs(device, ParallelLayout(*layout), enforce_eager=enforce_eager) is expected


class SummingModel:
    """A model of three sums over its group, which counts them as those of several ranks do."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.groups = SimpleNamespace(tp_group=TensorParallelGroup())
        self.sizes: list[int] = []

    def forward(self, input_ids: torch.Tensor, *_: object) -> torch.Tensor:
        self.sizes.append(len(input_ids))
        self.groups.tp_group.num_operations += 3
        return torch.zeros(len(input_ids), 4)


def graphs_of(model: SummingModel, capture: Capture) -> DecodeGraphs:
    return DecodeGraphs(model, [], sizes=graph_sizes(6), max_model_len=32, max_blocks=4, capture=capture)  # type: ignore[arg-type]


def test_the_largest_size_is_captured_first_and_each_after_a_run_without_capture() -> None:
    model = SummingModel()

    def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        step()
        return lambda: None, step()

    graphs_of(model, capture)
    assert model.sizes == [6, 6, 4, 4, 2, 2, 1, 1]


def test_collectives_of_a_replayed_step_count() -> None:
    """Else a rank that failed after a replay would pass for one that is still in step with the others."""
    model = SummingModel()
    graphs = graphs_of(model, lambda step: (lambda: None, step()))
    before = model.groups.tp_group.num_operations
    graphs.run(GraphSize(4))
    assert model.groups.tp_group.num_operations == before + 3


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("operation not permitted"),
            ConfigError,
            r"step of 6 sequences, .*not permitted.*enforce_eager=true",
        ),
        (CommunicationError("rank 1 is gone"), CommunicationError, "rank 1 is gone"),
    ],
)
def test_a_capture_that_fails_says_what_to_do(error: Exception, raised: type[Exception], message: str) -> None:
    def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        raise error

    with pytest.raises(raised, match=message):
        graphs_of(SummingModel(), capture)
