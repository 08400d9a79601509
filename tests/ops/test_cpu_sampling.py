"""Sampling on the compiled kernels: greedy alone, and the whole sampler against the one on the reference."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.sampling.params import SamplingParams
from pagoda_kernels.interface import KernelBackend
from tests.ops.test_greedy_sample import (
    test_a_row_with_nan_says_so_and_its_neighbours_do_not,
    test_greatest_logit_and_its_id,
    test_greatest_logit_of_a_large_vocabulary,
    test_infinite_logits,
    test_lowest_id_of_equals,
)
from tests.ops.test_token_bitmask import test_what_is_not_allowed_becomes_minus_infinity
from tests.support.cpu_kernels import kernels, require_cpu_kernels
from tests.support.naive_sampler import Row
from tests.support.sampler_rows import sample_rows

require_cpu_kernels()

__all__ = [
    "kernels",
    "test_greatest_logit_and_its_id",
    "test_greatest_logit_of_a_large_vocabulary",
    "test_lowest_id_of_equals",
    "test_a_row_with_nan_says_so_and_its_neighbours_do_not",
    "test_infinite_logits",
    "test_what_is_not_allowed_becomes_minus_infinity",
]


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
