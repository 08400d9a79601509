"""The compiled greedy sampling against torch's own, and the sampler on it against the sampler on the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagoda.sampling.params import SamplingParams
from pagoda_kernels.interface import KernelBackend
from tests.support.cpu_kernels import kernels, require_cpu_kernels
from tests.support.naive_sampler import Row
from tests.support.sampler_rows import sample_rows

require_cpu_kernels()

__all__ = ["kernels"]


@pytest.mark.parametrize("size", [1, 7, 16, 33, 1000, 40_000])
def test_greatest_logit_and_its_id(kernels: KernelBackend, size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    ids, best = kernels.greedy_sample(logits)
    assert torch.equal(best, logits.amax(-1))
    assert torch.equal(ids, logits.argmax(-1))


def test_lowest_id_of_equals(kernels: KernelBackend) -> None:
    logits = torch.zeros(1, 100)
    assert kernels.greedy_sample(logits)[0].tolist() == [0]
    for places in ([99], [40, 56], [17, 18, 33, 34], [3, 98, 99]):
        logits.fill_(-1.0)
        logits[0, places] = 2.5
        assert kernels.greedy_sample(logits)[0].tolist() == places[:1]


@pytest.mark.parametrize("place", [0, 15, 16, 49, 50])
def test_a_row_with_nan_says_so_and_its_neighbours_do_not(kernels: KernelBackend, place: int) -> None:
    logits = torch.randn(3, 51)
    logits[1, place] = torch.nan
    ids, best = kernels.greedy_sample(logits)
    assert best.isnan().tolist() == [False, True, False]
    assert 0 <= int(ids[1]) < 51


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits(kernels: KernelBackend, value: float) -> None:
    logits = torch.full((2, 37), -torch.inf)
    logits[1, 20] = value
    ids, best = kernels.greedy_sample(logits)
    assert best.tolist() == [-torch.inf, value]
    assert ids.tolist() == [0, 20 if value > 0 else 0]


@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_sampler_draws_as_on_the_reference(kernels: KernelBackend, vocab_size: int) -> None:
    random = np.random.default_rng(vocab_size)
    changes = ({"temperature": 0.0}, {}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 7}, {"top_k": 40, "top_p": 0.5})
    rows = [
        Row(
            random.normal(0, 2, vocab_size).round(1).astype(np.float32).tolist(),  # with equals
            [1],
            [2] * index,
            SamplingParams(seed=index, **changes[index % len(changes)]),
        )
        for index in range(18)
    ]
    assert sample_rows(rows, kernels=kernels).token_ids.tolist() == sample_rows(rows).token_ids.tolist()
    for row in rows:
        assert sample_rows([row], kernels=kernels).token_ids.tolist() == sample_rows([row]).token_ids.tolist()
