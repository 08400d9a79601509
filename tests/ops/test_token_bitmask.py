"""Masks over logits; test_cpu_sampling.py and test_triton_sampling.py run the same over their kernels."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pagoda_kernels.interface import KernelBackend


def bitmask_of(allowed: torch.Tensor) -> torch.Tensor:
    """int32 `[M, W]` of bools `[M, 32 * W]`."""
    weights = torch.tensor([1 << bit for bit in range(32)], dtype=torch.int64)
    words = (allowed.view(len(allowed), -1, 32) * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@given(
    num_words=st.integers(1, 5),
    tail=st.integers(0, 40),
    rows=st.permutations(range(4)).flatmap(lambda rows: st.integers(1, 4).map(lambda count: rows[:count])),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 100),
)
def test_what_is_not_allowed_becomes_minus_infinity(
    kernels: KernelBackend, num_words: int, tail: int, rows: list[int], density: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 32 * num_words + tail, generator=generator)
    allowed = torch.rand(len(rows), 32 * num_words, generator=generator) < density
    expected = logits.clone()
    for row, of_row in zip(rows, allowed, strict=True):
        expected[row, : 32 * num_words][~of_row] = float("-inf")
    kernels.apply_token_bitmask(logits, torch.tensor(rows, dtype=torch.int64), bitmask_of(allowed))
    assert torch.equal(logits, expected)
