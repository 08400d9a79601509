"""More than one rank: greedy tokens equal those of Hugging Face transformers at every layout.

As in test_greedy_parity.py prompts arrive at once and then once more, in a KV cache too small for them, in small and in large
chunks. The ranks are processes that talk over gloo. A default run takes two layouts and two families, the marker `slow` all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core import startup
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.lookahead import Speculation
from pagoda.scheduling.request import Request
from tests.support.drafts import ArbitraryDrafts, Steady
from tests.support.eagle3_heads import write_head
from tests.support.parity import ParityCase, make_parity_case, run_greedily
from tests.support.rank_pool import PooledExecutor, RankPool
from tests.support.recording import num_replayed, record_decode_steps

NEW_TOKENS = 20
LONGEST = 120

# Each has its own trouble: a vocabulary that does not divide, a window, one KV head for all ranks, biases, tied embeddings.
SPECS = {
    "llama": DummySpec(
        family="llama", tie_word_embeddings=True, num_heads=8, num_kv_heads=4, vocab_size=509, attention_bias=True
    ),
    "mistral": DummySpec(family="mistral", sliding_window=40, num_shards=3, vocab_size=511),
    "qwen2": DummySpec(family="qwen2", tie_word_embeddings=True, num_heads=4, num_kv_heads=1),
    "qwen3": DummySpec(family="qwen3", num_heads=4, num_kv_heads=2, num_shards=2, num_layers=4),
    # Layers 0 and 1 keep all tokens; of the others, in two groups, each stage has some.
    "windows": DummySpec(family="qwen3", num_layers=6, sliding_window=24, max_window_layers=2),
}

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
MATRIX = [
    pytest.param(layout, family, chunk, marks=pytest.mark.slow, id=f"tp{layout[0]}-pp{layout[1]}-{family}-chunk{chunk}")
    for layout in LAYOUTS
    for family in SPECS
    for chunk in (16, 256)
]
SUBSET = [
    pytest.param((2, 1), "mistral", 256, id="tp2-mistral"),
    pytest.param((2, 2), "qwen2", 256, id="tp2-pp2-qwen2"),
    pytest.param((2, 2), "mistral", 16, id="tp2-pp2-mistral"),
    pytest.param((2, 2), "windows", 16, id="tp2-pp2-windows"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(family: str) -> ParityCase:
        directory = tmp_path_factory.mktemp("parallel") / family
        return make_parity_case(directory, SPECS[family], num_prompts=12, longest=LONGEST, new_tokens=NEW_TOKENS)

    return make


def config_of(directory: Path, layout: tuple[int, int], chunk: int, **settings) -> PagodaConfig:
    values = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 8,
        "max_model_len": LONGEST + NEW_TOKENS,
        # Two of the longest at a time, or one of three groups in large chunks: every other one has to fight for blocks.
        "num_gpu_blocks_override": (3 if "windows" in directory.name and chunk > 16 else 2) * 18 + 1,
        "kv_cache_watermark": 0.0,
    }
    return PagodaConfig(
        model=str(directory),
        tensor_parallel_size=layout[0],
        pipeline_parallel_size=layout[1],
        **{**values, **settings},
    )


@pytest.fixture
def start(pool: RankPool, monkeypatch: pytest.MonkeyPatch):
    """Starts an engine whose ranks are processes of the pool; returns it with its executor."""
    started = []

    def start(config: PagodaConfig):
        def create(config, model_config):
            started.append(PooledExecutor(pool, config, model_config))
            return started[-1]

        monkeypatch.setattr(startup, "create_executor", create)
        return start_core(config), started[-1]

    yield start
    for executor in started:
        executor.shutdown()


@pytest.mark.parametrize(("layout", "family", "chunk"), SUBSET + MATRIX)
def test_every_token_equals_transformers_at_every_layout(layout, family, chunk, case_of, start) -> None:
    case = case_of(family)
    core, executor = start(config_of(case.directory, layout, chunk))
    assert run_greedily(core, case, "first-") == case.expected
    after_first = core.stats()
    assert run_greedily(core, case, "second-") == case.expected
    stats = core.stats()
    if not case.has_window:  # a window gives blocks back as fast as others are admitted
        assert stats.num_preemptions > 0, "the cache was meant to be too small"
    if family != "windows":  # three groups in so few blocks: what one request leaves, the next one takes
        assert stats.prefix_cache_hits > after_first.prefix_cache_hits, "nothing was found in the prefix cache"
    assert stats.num_blocks_in_use == 0
    spec = SPECS[family]
    assert sum(map(len, executor.kv_shapes)) == spec.num_layers * layout[0], "each stage has the KV of its own layers"
    assert {shape[1] for shapes in executor.kv_shapes for shape in shapes} == {max(1, spec.num_kv_heads // layout[0])}


def test_ranks_that_capture_their_steps_give_the_same_tokens(case_of, start) -> None:
    """The sums over the ranks are in what is captured; every rank replays as often, for that follows from the plan."""
    case = case_of("qwen2")
    core, executor = start(config_of(case.directory, (2, 1), 256))
    executor.call_all("run", record_decode_steps)
    assert run_greedily(core, case, "captured-") == case.expected
    first, second = executor.call_all("run", num_replayed)
    assert first == second > NEW_TOKENS


def outputs_of(core, requests: list[EngineRequest]) -> dict[str, tuple]:
    """Tokens, log-probabilities, prompt log-probabilities and error of every request."""
    found: dict[str, tuple] = {request.request_id: ([], [], [], None) for request in requests}
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for news in core.step().outputs:
            tokens, logprobs, prompt_logprobs, _ = found[news.request_id]
            tokens.extend(news.new_token_ids)
            for entries, flat in ((news.logprobs, logprobs), (news.prompt_logprobs, prompt_logprobs)):
                flat.extend(value for entry in entries or [] if entry is not None for value in entry.logprobs)
            found[news.request_id] = (tokens, logprobs, prompt_logprobs, news.error)
    return found


def mixed_requests() -> list[EngineRequest]:
    """Sampled, penalized and scored ones, side by side."""
    prompts = [[(17 * n + 3 * index) % 500 for n in range(5 + 9 * index)] for index in range(5)]
    samplings = [
        SamplingParams(seed=5, temperature=0.9, top_p=0.9, ignore_eos=True),
        SamplingParams(seed=6, top_k=7, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=True),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(seed=7, min_p=0.05, frequency_penalty=0.3, ignore_eos=True),
        SamplingParams(temperature=0.0, logit_bias={3: 4.0}, min_tokens=4, ignore_eos=True),
    ]
    return [
        EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, params=sampling, max_tokens=12)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["tp2", "tp2-pp2"])
def test_sampling_and_logprobs_are_those_of_one_rank(layout, case_of, start) -> None:
    directory = case_of("mistral").directory
    alone = outputs_of(start_core(config_of(directory, (1, 1), 32)), mixed_requests())
    core, _ = start(config_of(directory, layout, 32))
    together = outputs_of(core, mixed_requests())
    assert {name: found[0] for name, found in together.items()} == {name: found[0] for name, found in alone.items()}
    for index in (1, 2):
        assert together["r2"][index] == pytest.approx(alone["r2"][index], abs=2e-3)


def test_several_steps_on_one_plan_give_the_same_tokens(case_of, start) -> None:
    case = case_of("qwen2")
    core, _ = start(config_of(case.directory, (2, 1), 256, num_scheduler_steps=4))
    assert run_greedily(core, case, "multi-step-") == case.expected


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["tp2", "tp2-pp2"])
def test_drafts_change_no_token(layout, case_of, start) -> None:
    case = case_of("mistral")
    core, _ = start(config_of(case.directory, layout, 32))

    def truth(request: Request, count: int) -> list[int]:
        expected = case.expected[case.prompts.index(request.spec.prompt_token_ids)]
        return expected[request.num_output_tokens :][:count]

    scheduler = core._scheduler
    scheduler._lookahead = Speculation(scheduler.kv, ArbitraryDrafts(Random(1), truth, core.ready.vocab_size), 32)
    assert run_greedily(core, case, "first-") == case.expected
    assert run_greedily(core, case, "second-") == case.expected
    stats = core.stats()
    assert 0 < stats.num_spec_accepted_tokens < stats.num_spec_draft_tokens


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["tp2", "tp2-pp2"])
def test_draft_model_on_the_sampling_rank_changes_no_token(layout, case_of, start) -> None:
    case = case_of("qwen2")
    speculation = {"method": "draft_model", "model": str(case.directory), "num_speculative_tokens": 3}
    core, _ = start(config_of(case.directory, layout, 32, speculative_config=speculation))
    core._scheduler._lookahead._proposer = Steady(3)
    assert run_greedily(core, case, "first-") == case.expected
    assert run_greedily(core, case, "second-") == case.expected
    assert core.stats().num_spec_accepted_tokens > 0


@pytest.mark.parametrize("has_lm_head", [True, False], ids=["own", "shared"])
def test_eagle3_head_on_the_sampling_rank_changes_no_token(has_lm_head, case_of, start, tmp_path) -> None:
    case = case_of("qwen2")
    head = write_head(
        tmp_path / "head", SPECS["qwen2"], has_lm_head=has_lm_head, draft_vocab_size=200 if has_lm_head else None
    )
    speculation = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    core, _ = start(config_of(case.directory, (2, 1), 32, speculative_config=speculation))
    core._scheduler._lookahead._proposer = Steady(3)
    assert run_greedily(core, case, "first-") == case.expected
    assert run_greedily(core, case, "second-") == case.expected
    assert core.stats().num_spec_draft_tokens > 0


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_request_that_cannot_be_prepared_fails_alone(layout, case_of, start) -> None:
    """The sampler's state is on one rank: a fault there must not change what the ranks exchange."""
    case = case_of("qwen2")
    core, executor = start(config_of(case.directory, layout, 256))
    executor.pool.send(executor.layout.sampling_rank, "run", install_fault, "prepare@bad=raise")
    executor.pool.take(executor.layout.sampling_rank)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [
        EngineRequest(request_id=name, prompt_token_ids=case.prompts[3], params=sampling, max_tokens=NEW_TOKENS)
        for name in ("bad", "good", "bad-too")
    ]
    found = outputs_of(core, requests)
    executor.pool.send(executor.layout.sampling_rank, "run", install_fault, None)
    executor.pool.take(executor.layout.sampling_rank)
    assert found["good"][0] == case.expected[3]
    assert found["good"][3] is None
    assert "could not be prepared" in found["bad"][3]
    assert "could not be prepared" in found["bad-too"][3]


def install_fault(worker, specification: str | None) -> None:
    from pagoda import faults

    faults.install(specification)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["tp2", "tp2-pp2"])
def test_dummy_weights_are_the_same_model_at_every_layout(layout, case_of, start) -> None:
    directory = case_of("llama").directory
    requests = [
        EngineRequest(
            request_id="a",
            prompt_token_ids=[5, 6, 7, 8],
            params=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=12,
        )
    ]
    alone = outputs_of(start_core(config_of(directory, (1, 1), 32, load_format="dummy", seed=3)), requests)
    core, _ = start(config_of(directory, layout, 32, load_format="dummy", seed=3))
    assert outputs_of(core, requests) == alone


def logits_on(worker, hidden: list[list[float]]):
    """This rank's part in the logits of hidden states: (dtype, values) on tensor rank 0, None on the others."""
    with torch.inference_mode():
        logits = worker.runner.model.compute_logits(torch.tensor(hidden, dtype=torch.bfloat16))
    return None if logits is None else (str(logits.dtype), logits.tolist())


@pytest.mark.parametrize("cpu_kernels", ["auto", "reference"])
def test_logits_of_a_bfloat16_model_are_gathered_in_float32(cpu_kernels: str, case_of, start) -> None:
    directory = case_of("mistral").directory  # 511 tokens: the second rank's last row is padding
    settings = {"dtype": "bfloat16", "cpu_kernels": cpu_kernels}
    _, executor = start(config_of(directory, (2, 1), 32, **settings))
    (weight,) = (
        tensors["lm_head.weight"]
        for tensors in map(load_file, directory.glob("*.safetensors"))
        if "lm_head.weight" in tensors
    )
    hidden = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    (dtype, logits), other = executor.call_all("run", logits_on, hidden.tolist())
    assert other is None
    assert dtype == "torch.float32"
    expected = hidden.double() @ weight.bfloat16().double().T
    torch.testing.assert_close(torch.tensor(logits, dtype=torch.float64), expected, rtol=0, atol=1e-5)


def exchange(worker) -> dict[str, list]:
    """What the operations of this rank's groups give for tensors that tell the ranks apart."""
    import torch

    groups = worker.groups
    mine = torch.full((1, 2), float(groups.coordinates.rank))
    gathered = groups.tp_group.gather(mine.clone(), dim=1)
    found = {
        "sum": groups.tp_group.all_reduce(mine.clone()).tolist(),
        "all": groups.tp_group.all_gather(mine.clone(), dim=0).tolist(),
        "gathered": None if gathered is None else gathered.tolist(),
        "first": groups.tp_group.broadcast(mine.clone()).tolist(),
    }
    sizes = (3, 5000)  # not worth sharing; a part from each rank
    for size in sizes:
        if groups.coordinates.is_first_stage:
            groups.send_hidden_states(torch.arange(2.0 * size).view(2, size) + 7)
        else:
            received = groups.recv_hidden_states(torch.empty(2, size))
            found[f"received {size}"] = torch.equal(received, torch.arange(2.0 * size).view(2, size) + 7)
    return found


def test_groups_exchange_what_they_say(case_of, start) -> None:
    _, executor = start(config_of(case_of("qwen2").directory, (2, 2), 32))
    found = executor.call_all("run", exchange)
    for stage in (0, 1):
        low, high = 2.0 * stage, 2.0 * stage + 1
        for tensor_rank in (0, 1):
            rank = found[2 * stage + tensor_rank]
            assert rank["sum"] == [[low + high] * 2]
            assert rank["all"] == [[low, low], [high, high]]
            assert rank["gathered"] == ([[low, low, high, high]] if tensor_rank == 0 else None)
            assert rank["first"] == [[low, low]]
            assert stage == 0 or (rank["received 3"] and rank["received 5000"])
