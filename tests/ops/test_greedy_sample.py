"""Greedy sampling against torch's own; test_cpu_sampling.py and test_triton_sampling.py run the same over their kernels."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend


def check(kernels: KernelBackend, size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    ids, best = kernels.greedy_sample(logits)
    assert torch.equal(best, logits.amax(-1))
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("size", [1, 7, 16, 33, 1000])
def test_greatest_logit_and_its_id(kernels: KernelBackend, size: int) -> None:
    check(kernels, size)


def test_greatest_logit_of_a_large_vocabulary(kernels: KernelBackend) -> None:
    check(kernels, 40_000)


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
