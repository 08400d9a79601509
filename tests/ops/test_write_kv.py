from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_land_in_their_slots_and_nowhere_else(kernels: KernelBackend, dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(6, 2, 4, 8, dtype=dtype), torch.zeros(6, 2, 4, 8, dtype=dtype)
    key, value = torch.randn(3, 2, 8).to(dtype), torch.randn(3, 2, 8).to(dtype)
    slots = torch.tensor([5 * 4 + 3, 2 * 4, 2 * 4 + 1])
    kernels.write_kv(key, value, k_cache, v_cache, slots)
    for cache, written in ((k_cache, key), (v_cache, value)):
        expected = torch.zeros_like(cache)
        expected[5, :, 3], expected[2, :, 0], expected[2, :, 1] = written
        assert torch.equal(cache, expected)


def test_strided_views_are_written_as_they_look(kernels: KernelBackend) -> None:
    fused = torch.randn(5, 12, 8)
    key, value = fused[:, 8:10], fused[:, 10:12]
    k_cache, v_cache = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)
    kernels.write_kv(key, value, k_cache, v_cache, torch.arange(4, 9))
    assert torch.equal(k_cache.transpose(1, 2).reshape(12, 2, 8)[4:9], key)
    assert torch.equal(v_cache.transpose(1, 2).reshape(12, 2, 8)[4:9], value)


def test_padding_tokens_touch_the_null_block_only(kernels: KernelBackend) -> None:
    k_cache, v_cache = torch.zeros(3, 1, 4, 8), torch.zeros(3, 1, 4, 8)
    kernels.write_kv(torch.ones(4, 1, 8), torch.ones(4, 1, 8), k_cache, v_cache, torch.tensor([0, 0, 6, 0]))
    assert k_cache[1:].sum() == 8
    assert v_cache[1:].sum() == 8
