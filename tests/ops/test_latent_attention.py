"""Attention over latent vectors, and products a head, of the CPU's kernels against what they say they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight
from tests.ops.attention_cases import make_case
from tests.ops.test_cpu_attention import alone
from tests.support.cpu_kernels import kernels, require_cpu_kernels

require_cpu_kernels()

__all__ = ["kernels"]

ROWS = [(1, 700), (1, 5), (90, 640), (7, 7)]


@pytest.mark.parametrize("rank", [32, 36, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_first_numbers_of_each_latent(kernels: KernelBackend, dtype: torch.dtype, rank: int) -> None:
    case = make_case(ROWS, num_heads=4, num_kv_heads=1, head_dim=40, dtype=dtype, block_size=16)
    actual = kernels.latent_attention(case.query, case.k_cache, case.metadata, case.scale, rank)
    assert actual.shape == (*case.query.shape[:2], rank)
    assert actual.is_contiguous()
    wide = (case.query.float(), case.k_cache.float(), case.metadata, case.scale, rank)
    expected = reference.BACKEND.latent_attention(*wide)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_heads", [4, 128])  # few enough for values to stay where they are, and many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_has_the_same_bits_alone_in_a_batch_and_in_any_chunks(
    kernels: KernelBackend, dtype: torch.dtype, num_heads: int
) -> None:
    case = make_case(ROWS, num_heads=num_heads, num_kv_heads=1, head_dim=40, dtype=dtype, block_size=16)
    batched = kernels.latent_attention(case.query, case.k_cache, case.metadata, case.scale, 32)
    starts = case.metadata.query_start_loc.tolist()
    for row in range(4):
        query_len = starts[row + 1] - starts[row]
        for first, last in {(0, query_len), (0, 1), (query_len // 3, query_len // 2 + 1), (query_len - 1, query_len)}:
            query = case.query[starts[row] + first : starts[row] + last]
            metadata = alone(case, row, first, last)
            chunk = kernels.latent_attention(query, case.k_cache, metadata, case.scale, 32)
            assert torch.equal(chunk, batched[starts[row] + first : starts[row] + last])


def test_a_cache_of_several_heads_is_refused(kernels: KernelBackend) -> None:
    case = make_case([(1, 9)], num_heads=4, num_kv_heads=2)
    with pytest.raises(RuntimeError, match="a latent cache has one head"):
        kernels.latent_attention(case.query, case.k_cache, case.metadata, case.scale, 8)


def packed_heads(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    rows = F.pad(weight, (0, 0, 0, -weight.shape[1] % PANEL)).flatten(0, 1)
    packed = empty_packed(len(rows), weight.shape[2], dtype)
    pack_into(packed, 0, rows)
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "outputs", "inputs"), [(3, 12, 20), (2, 64, 32), (5, 33, 7)])
def test_each_head_has_a_product_of_its_own(
    kernels: KernelBackend, dtype: torch.dtype, heads: int, outputs: int, inputs: int
) -> None:
    weight = torch.randn(heads, outputs, inputs).to(dtype)
    x = torch.randn(40, heads, inputs + 3).to(dtype)[:, :, :inputs]  # rows with a gap behind each
    packed = packed_heads(weight, dtype)
    actual = kernels.packed_linear_heads(x, packed, outputs)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    expected = torch.einsum("thi,hoi->tho", x.float(), weight.float())
    torch.testing.assert_close(actual.float(), expected, **tolerance)
    torch.testing.assert_close(reference.BACKEND.packed_linear_heads(x, packed, outputs).float(), expected, **tolerance)
    for first, last in ((0, 1), (3, 20)):
        assert torch.equal(kernels.packed_linear_heads(x[first:last], packed, outputs), actual[first:last])
    assert kernels.packed_linear_heads(x[:0], packed, outputs).shape == (0, heads, outputs)


def test_a_weight_of_other_heads_is_refused(kernels: KernelBackend) -> None:
    packed = packed_heads(torch.randn(3, 12, 20), torch.float32)
    with pytest.raises(RuntimeError, match="1 panels for each of 2 heads"):
        kernels.packed_linear_heads(torch.randn(4, 2, 20), packed, 12)
