"""Every family against transformers, in float32 on random weights.

Logits at every position, in chunks and steps of all kinds; greedy tokens of the engine when requests are preempted and
prefixes found, on one rank and on two tensor ranks in two stages.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core import startup
from pagoda.engine.core.startup import start_core
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.layer_config import MoE
from pagoda.models.loading.loader import load_weights
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import FAMILIES, LONGEST, VOCAB_SIZE, family_config
from tests.support.model_harness import PagedModel, run_in_chunks, save_random_checkpoint
from tests.support.parity import ParityCase, parity_case, run_greedily
from tests.support.rank_pool import PooledExecutor, RankPool

require_cpu_kernels()

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

NEW_TOKENS = 14
PROMPT_LENGTHS = (1, 8, 40, 97)
WITH_STATE = ("qwen3-next", "qwen3.5", "qwen3.5-moe")


# Put together from layers that other families have: all but their logits is in the slow part.
COMPOSED = (
    "gemma",
    "glm",
    "cohere",
    "seed-oss",
    "ernie-4.5",
    "exaone4-full",
    "olmoe",
    "granite-moe-shared",
    "minimax-m2",
    "dots1",
    "mistral4",
    "minicpm3",
    "youtu",
    "deepseek-v3-no-query-rank",
)
composed_are_slow = pytest.mark.parametrize(
    "checkpoint",
    [pytest.param(name, marks=[pytest.mark.slow] if name in COMPOSED else []) for name in FAMILIES],
    indirect=True,
)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Directory and transformers' model."""
    directory = tmp_path_factory.mktemp("family") / request.param
    return directory, save_random_checkpoint(family_config(request.param), directory)


def load(directory: Path, dtype: torch.dtype = torch.float32, *, kernels: str) -> DecoderForCausalLM:
    """With the reference's kernels, or the CPU's, packed and fused where that can be."""
    backend.use_backend(kernels)
    packed = kernels == "cpu"
    model = build_model(ModelConfig.from_directory(directory), dtype, packed=packed, max_model_len=LONGEST)
    load_weights(model, directory)
    if packed:
        fuse_layers(model)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.inference_mode()
def logits_of_transformers(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt])).logits[0].float()
    return logits


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_logits_are_those_of_transformers(kernels: str, checkpoint: tuple[Path, Any]) -> None:
    directory, theirs = checkpoint
    ours = run_in_chunks(load(directory, kernels=kernels), prompts(), block_size=8)
    for prompt, actual in zip(prompts(), ours, strict=True):
        expected = logits_of_transformers(theirs, prompt)
        assert expected.std() > 0.5, "the logits are too flat to tell anything"
        # The two forms of the delta rule in transformers, by token and by chunk, are five times as far apart as that.
        tolerance = 1e-4 if directory.name in WITH_STATE else 2e-5
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def with_parameters(model: Any, dtype: torch.dtype) -> Any:
    """A copy with parameters of `dtype`; `to` would round buffers, too, such as the frequencies of positions."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(dtype)
    return other


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the differences at a position, of the position in the middle: where rounding chooses another expert,
    one is as far as it likes."""
    return float((logits - expected).square().mean(dim=1).sqrt().median())


def test_bfloat16_is_no_further_from_float32_than_that_of_transformers(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    narrow = with_parameters(checkpoint[1], torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    wide = with_parameters(narrow, torch.float32)
    ours = run_in_chunks(load(tmp_path, torch.bfloat16, kernels="cpu"), prompts(), block_size=8)
    expected = torch.cat([logits_of_transformers(wide, prompt) for prompt in prompts()])
    theirs = torch.cat([logits_of_transformers(narrow, prompt) for prompt in prompts()])
    assert distance(torch.cat(ours), expected) <= 1.1 * distance(theirs, expected)
    config = ModelConfig.from_directory(tmp_path)
    if not any(isinstance(layer.mlp, MoE) for layer in config.layers):
        assert (torch.cat(ours) - expected).norm() <= 1.1 * (theirs - expected).norm()


@composed_are_slow
def test_packed_model_gives_a_sequence_the_same_bits_in_any_company(checkpoint: tuple[Path, Any]) -> None:
    directory, _ = checkpoint
    model = load(directory, kernels="cpu")
    together = run_in_chunks(model, prompts(), block_size=8)
    for prompt, expected in zip(prompts(), together, strict=True):
        alone = PagedModel(model, block_size=8)
        alone.add(prompt)
        alone.step({0: len(prompt)})
        assert torch.equal(alone.logits_of(0), expected)


# Norms over all heads, LayerNorm, layers in parallel, latent attention, recurrent layers, output gates and queries that grow
# run layer by layer.
NOT_FUSED = (
    "gemma4",
    "gemma4-edge",
    "gemma4-moe",
    "olmo2",
    "olmo3",
    "olmoe",
    "minimax-m2",
    "cohere",
    "cohere2",
    "ministral3",
    "mistral4",
    "minicpm3",
    "youtu",
    "glm4-moe-lite",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-no-query-rank",
    *WITH_STATE,
)


@composed_are_slow
def test_all_layers_run_as_one_operator_with_the_bits_of_single_ones(checkpoint: tuple[Path, Any]) -> None:
    directory, _ = checkpoint
    model = load(directory, kernels="cpu")
    if directory.name in NOT_FUSED:
        assert model.fused_layers is None
        return
    assert model.fused_layers is not None
    as_one = run_in_chunks(model, prompts(), block_size=8)
    model.fused_layers = None
    for single, fused in zip(run_in_chunks(model, prompts(), block_size=8), as_one, strict=True):
        assert torch.equal(fused, single)


@pytest.fixture(scope="module")
def case(checkpoint: tuple[Path, Any]) -> ParityCase:
    directory, theirs = checkpoint
    return parity_case(directory, theirs, num_prompts=11, longest=LONGEST - NEW_TOKENS, new_tokens=NEW_TOKENS)


# Blocks of a model with recurrent layers: in so few, all states of a prefix are soon lost.
FEW_STATES = 45


def config_of(directory: Path, **settings: Any) -> PagodaConfig:
    model = ModelConfig.from_directory(directory)
    groups = len(model.kv_groups(8, LONGEST))
    values = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 8,
        "max_model_len": LONGEST,
        # Hardly more than one of the longest: every other one has to fight for blocks. With several groups there is room, for
        # a prefix is found only where all of them still have it. Of a state there are few blocks, and these are larger.
        "num_gpu_blocks_override": FEW_STATES
        if model.has_recurrent_layers
        else LONGEST // 8 + 7
        if groups == 1
        else groups * 60 + 1,
        "kv_cache_watermark": 0.0,
    }
    return PagodaConfig(model=str(directory), **{**values, **settings})


@composed_are_slow
def test_every_token_is_that_of_transformers(case: ParityCase) -> None:
    core = start_core(config_of(case.directory))
    assert run_greedily(core, case, "first-") == case.expected
    after_first = core.stats()
    assert run_greedily(core, case, "second-") == case.expected
    assert core.stats().num_preemptions > 0 or case.has_window
    core.shutdown()
    if core.stats().num_blocks < FEW_STATES:
        core = start_core(config_of(case.directory, num_gpu_blocks_override=4 * FEW_STATES))
        assert run_greedily(core, case, "first-") == case.expected
        after_first = core.stats()
        assert run_greedily(core, case, "second-") == case.expected
    assert core.stats().prefix_cache_hits > after_first.prefix_cache_hits
    core.shutdown()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


# One with a shared expert, one with biases, and one with states.
@pytest.mark.parametrize("checkpoint", ["qwen2-moe", "gpt-oss", "qwen3.5-moe"], indirect=True)
def test_every_token_is_that_of_transformers_where_two_ranks_share_out_the_experts(
    case: ParityCase, pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = []

    def create(config: PagodaConfig, model_config: ModelConfig) -> PooledExecutor:
        executors.append(PooledExecutor(pool, config, model_config))
        return executors[-1]

    monkeypatch.setattr(startup, "create_executor", create)
    core = start_core(config_of(case.directory, tensor_parallel_size=2, enable_expert_parallel=True))
    try:
        assert run_greedily(core, case, "experts-") == case.expected
    finally:
        for executor in executors:
            executor.shutdown()


@composed_are_slow
def test_every_token_is_that_of_transformers_on_two_tensor_ranks_in_two_stages(
    case: ParityCase, pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = []

    def create(config: PagodaConfig, model_config: ModelConfig) -> PooledExecutor:
        executors.append(PooledExecutor(pool, config, model_config))
        return executors[-1]

    monkeypatch.setattr(startup, "create_executor", create)
    # Layers that read what others keep must be where those are.
    stages = 1 if case.directory.name == "gemma4-edge" else 2
    core = start_core(config_of(case.directory, tensor_parallel_size=2, pipeline_parallel_size=stages))
    try:
        assert run_greedily(core, case, "ranks-") == case.expected
    finally:
        for executor in executors:
            executor.shutdown()
