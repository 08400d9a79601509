from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pagoda.sampling.noise import RequestNoise
from pagoda.sampling.params import SamplingParams
from pagoda.sampling.sampler import Sampler
from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from tests.ops.test_greedy_sample import (
    test_a_row_with_nan_says_so_and_its_neighbours_do_not,
    test_greatest_logit_and_its_id,
    test_infinite_logits,
    test_lowest_id_of_equals,
)
from tests.ops.test_token_bitmask import test_what_is_not_allowed_becomes_minus_infinity
from tests.support.sampler_rows import request_of
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

from pagoda_kernels.gpu import sampling as launchers  # noqa: E402

__all__ = [
    "kernels",
    "test_greatest_logit_and_its_id",
    "test_lowest_id_of_equals",
    "test_a_row_with_nan_says_so_and_its_neighbours_do_not",
    "test_infinite_logits",
    "test_what_is_not_allowed_becomes_minus_infinity",
]

VOCABULARY = 300


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles, the last one not full."""
    monkeypatch.setattr(launchers, "SAMPLING_TILE", 64)


def drawn(
    kernels: KernelBackend, logits: torch.Tensor, params: list[SamplingParams], positions: list[int]
) -> list[int]:
    best = kernels.greedy_sample(logits)[1]
    seeds = np.array([(p.seed or 0) % 2**64 for p in params], dtype=np.uint64).view(np.int64)
    return kernels.sample_top_p_by_rejection(
        logits,
        best,
        torch.arange(len(params)),
        torch.from_numpy(seeds),
        torch.tensor(positions),
        torch.tensor([1 / p.temperature for p in params]),
        torch.tensor([p.min_p for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
    ).tolist()


def sampled(
    logits: torch.Tensor,
    params: list[SamplingParams],
    positions: list[int],
    kernels: KernelBackend = reference.BACKEND,
) -> list[int]:
    pool = torch.zeros(len(params), 4, dtype=torch.int64)
    sampler = Sampler(vocab_size=VOCABULARY, token_pool=pool, kernels=kernels, seed=0)
    for req_index, p in enumerate(params):
        sampler.add(req_index, request_of(p))
    return sampler.sample(logits.clone(), np.arange(len(params)), np.array(positions)).token_ids.tolist()


@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (1.0, 0.05), (0.9, 0.05), (0.3, 0.0), (1e-6, 0.0)])
def test_draws_are_those_of_the_torch_sampler(kernels: KernelBackend, top_p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, VOCABULARY, generator=generator) * 2
    logits[3] = logits[3].round()  # many equals
    params = [
        SamplingParams(temperature=t, top_p=top_p, min_p=min_p, seed=seed)
        for t, seed in zip((1.0, 0.7, 2.0, 1.0), (0, 2**63 - 1, -(2**63), -5), strict=True)
    ]
    for position in (1, 2**40 + 1):
        positions = [position + row for row in range(len(params))]
        assert drawn(kernels, logits, params, positions) == sampled(logits, params, positions)


def test_rejected_draws_go_on_with_further_numbers(kernels: KernelBackend) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 250] = 0.01
    params = [SamplingParams(temperature=1.0, top_p=0.02, seed=3)]
    for position in (1, 2):
        token = drawn(kernels, logits, params, [position])
        assert token == sampled(logits, params, [position])
        assert token[0] in {250, 0, 1, 2, 3, 4, 5}  # the shortest beginning of the order that weighs 2 %


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_that_cannot_be_sampled_ends_the_search(kernels: KernelBackend) -> None:
    logits = torch.full((2, VOCABULARY), -math.inf)
    logits[1, 3] = math.nan
    params = [SamplingParams(temperature=1.0, seed=0)] * 2
    assert all(0 <= token < VOCABULARY for token in drawn(kernels, logits, params, [1, 1]))


def test_seeds_of_request_slots_are_the_bits_that_the_kernel_takes() -> None:
    noise = RequestNoise(3, seed=0)
    noise.add(1, SamplingParams(seed=-1))
    noise.add(2, SamplingParams(seed=5))
    assert noise.seeds_of(np.array([2, 1])).tolist() == [5, -1]


@pytest.mark.parametrize("has_top_k", [True, False])
def test_sampler_on_a_gpu_draws_as_on_a_cpu(kernels: KernelBackend, has_top_k: bool) -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.0, top_p=0.7, min_p=0.01, seed=2),
        SamplingParams(temperature=1.0, top_k=20 if has_top_k else 0, top_p=0.9, seed=3),
        SamplingParams(temperature=1.0, seed=4),
    ]
    positions = [5, 6, 7, 8, 9]
    assert sampled(logits, params, positions, kernels) == sampled(logits, params, positions)
