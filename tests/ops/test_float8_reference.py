"""The reference over float8 caches, beside float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pagoda_kernels.reference.attention import to_float8
from tests.ops.attention_cases import make_case


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_rounding_left_counts_times_its_scales(dtype: torch.dtype) -> None:
    case = make_case([(1, 9), (1, 40), (5, 30)])
    scales = (0.3, 0.7)
    stored = [to_float8(cache, scale, dtype) for cache, scale in zip((case.k_cache, case.v_cache), scales, strict=True)]
    keys, values = (
        [to_float8(rows, scale, dtype).double() * scale for rows in contexts]
        for contexts, scale in zip((case.keys, case.values), scales, strict=True)
    )
    case = dataclasses.replace(case, k_cache=stored[0], v_cache=stored[1], keys=keys, values=values, kv_scales=scales)
    case.assert_matches()


def test_numbers_are_kept_in_range_and_rounded_to_the_nearest() -> None:
    numbers = torch.tensor([0.0, 1.0, 1.06, 1.07, 0.1, 500.0, -1e9, math.nan])
    e4m3 = to_float8(numbers, 1.0, torch.float8_e4m3fn).float()
    assert e4m3[:7].tolist() == [0.0, 1.0, 1.0, 1.125, 0.1015625, 448.0, -448.0]
    assert e4m3[7].isnan()
    assert to_float8(torch.tensor([1e9, 1.07]), 0.5, torch.float8_e5m2).float().tolist() == [57344.0, 2.0]
