"""The compiled greedy choice against torch's own."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.sampling import choose_greedy
from tests.support.cpu_kernels import cpu_backend, require_cpu_kernels

require_cpu_kernels()

__all__ = ["cpu_backend"]
pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("size", [1, 7, 16, 33, 1000, 40_000])
def test_greatest_logit_and_its_id(size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    ids, best = choose_greedy(logits)
    assert torch.equal(best, logits.amax(-1))
    assert torch.equal(ids, logits.argmax(-1))


def test_lowest_id_of_equals() -> None:
    logits = torch.zeros(1, 100)
    assert choose_greedy(logits)[0].tolist() == [0]
    for places in ([99], [40, 56], [17, 18, 33, 34], [3, 98, 99]):
        logits.fill_(-1.0)
        logits[0, places] = 2.5
        assert choose_greedy(logits)[0].tolist() == places[:1]


@pytest.mark.parametrize("place", [0, 15, 16, 49, 50])
def test_a_row_with_nan_says_so_and_its_neighbours_do_not(place: int) -> None:
    logits = torch.randn(3, 51)
    logits[1, place] = torch.nan
    ids, best = choose_greedy(logits)
    assert best.isnan().tolist() == [False, True, False]
    assert 0 <= int(ids[1]) < 51


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits(value: float) -> None:
    logits = torch.full((2, 37), -torch.inf)
    logits[1, 20] = value
    ids, best = choose_greedy(logits)
    assert best.tolist() == [-torch.inf, value]
    assert ids.tolist() == [0, 20 if value > 0 else 0]
