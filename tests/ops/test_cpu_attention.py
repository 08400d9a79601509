from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata
from tests.ops.attention_cases import AttentionCase, make_case
from tests.support.cpu_kernels import kernels, require_cpu_kernels

require_cpu_kernels()

__all__ = ["kernels"]

DTYPES = [torch.float32, torch.bfloat16]
WINDOWS = [None, 100]


def alone(case: AttentionCase, row: int, first: int, last: int) -> AttentionMetadata:
    """Query tokens `first .. last - 1` of a row in a batch of their own, as a chunk that ends there would be run."""
    metadata = case.metadata
    query_len = int(metadata.query_start_loc[row + 1] - metadata.query_start_loc[row])
    seq_len = int(metadata.seq_lens[row]) - (query_len - last)
    return dataclasses.replace(
        metadata,
        query_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
        seq_lens=torch.tensor([seq_len], dtype=torch.int32),
        block_table=metadata.block_table[row : row + 1],
        max_query_len=last - first,
        max_seq_len=seq_len,
        num_decode_rows=int(last - first == 1),
        derived={},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", WINDOWS)
def test_a_query_has_the_same_bits_alone_in_a_batch_and_in_any_chunks(
    kernels: KernelBackend, dtype: torch.dtype, sliding_window: int | None
) -> None:
    case = make_case([(1, 700), (1, 5), (90, 640), (300, 300)], dtype=dtype, block_size=16, head_dim=32)
    batched = case.run(sliding_window)
    starts = case.metadata.query_start_loc.tolist()
    for row in range(4):
        query_len = starts[row + 1] - starts[row]
        for first, last in {(0, query_len), (0, 1), (query_len // 3, query_len // 2 + 1), (query_len - 1, query_len)}:
            query = case.query[starts[row] + first : starts[row] + last]
            metadata = alone(case, row, first, last)
            chunk = kernels.paged_attention(query, case.k_cache, case.v_cache, metadata, case.scale, sliding_window)
            assert torch.equal(chunk, batched[starts[row] + first : starts[row] + last])


@pytest.mark.parametrize("sliding_window", [None, 700])
def test_number_of_threads_changes_no_bit(sliding_window: int | None) -> None:
    case = make_case([(1, 1500)], num_heads=2, num_kv_heads=1, block_size=16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = case.run(sliding_window)
        torch.set_num_threads(4)  # more than one unit: the segments are spread
        assert torch.equal(case.run(sliding_window), single)
    finally:
        torch.set_num_threads(before)
    case.assert_matches(sliding_window)


def test_single_token_rows_have_the_same_bits_as_prefill_rows() -> None:
    rows = [(1, 1), (1, 70), (3, 30), (1, 129)]
    assert torch.equal(make_case(rows, num_decode_rows=0).run(), make_case(rows).run())


@pytest.mark.parametrize("head_dim", [8, 24, 40, 80, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dim_of_any_even_size(head_dim: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    make_case([(1, 9), (1, 100), (7, 80)], head_dim=head_dim, dtype=dtype).assert_matches(tolerance=tolerance)


def test_extreme_scores_give_no_nan() -> None:
    case = make_case([(1, 200), (30, 90)])
    case.query.mul_(1e4)
    assert case.run().isfinite().all()


def test_a_nan_in_a_row_stays_in_it() -> None:
    case = make_case([(1, 30), (1, 40)])
    case.query[0] = torch.nan
    output = case.run()
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotate_and_store_equals_its_parts(kernels: KernelBackend, dtype: torch.dtype, has_norm: bool) -> None:
    fused = torch.randn(6, 8, 24).to(dtype)
    query, key, value = fused.split((4, 2, 2), dim=1)
    angles = torch.randn(6, 12)
    weights = [torch.rand(24).to(dtype) + 0.5 for _ in range(2)] if has_norm else [None, None]
    slots = torch.tensor([17, 4, 0, 0, 5, 30])
    results = []
    for run in (kernels.rotate_and_store, reference.BACKEND.rotate_and_store):
        caches = torch.zeros(4, 2, 8, 24, dtype=dtype), torch.zeros(4, 2, 8, 24, dtype=dtype)
        turned = run(query, key, value, angles.cos(), angles.sin(), *weights, 1e-6, *caches, slots)
        for cache in caches:
            cache[0] = 0  # the null block: two tokens went to one slot
        results.append((turned, *caches))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_wrong_shapes_are_refused_by_name(kernels: KernelBackend) -> None:
    case = make_case([(1, 9)])
    with pytest.raises(RuntimeError, match="v_cache has shape"):
        kernels.paged_attention(case.query, case.k_cache, case.v_cache[:, :, :4], case.metadata, case.scale)
    with pytest.raises(RuntimeError, match="query is Double"):
        kernels.paged_attention(case.query.double(), case.k_cache, case.v_cache, case.metadata, case.scale)
