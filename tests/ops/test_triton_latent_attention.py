"""Attention over latent vectors in Triton's interpreter, against the torch twin."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from tests.ops.attention_cases import AttentionCase, make_case
from tests.ops.test_cpu_attention import alone
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

from pagoda_kernels.gpu import latent_attention, tuning  # noqa: E402
from pagoda_kernels.gpu.tuning import AttentionTiles, SegmentRule  # noqa: E402

__all__ = ["kernels"]

LATENT_DIM, RANK = 40, 32
ROWS = [(1, 1), (1, 70), (1, 130), (9, 40), (3, 3)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short contexts have many of them, and segments of 32 tokens."""
    tiles = AttentionTiles(head_dim=LATENT_DIM, element_bytes=4, rows=16, tile=16, num_warps=4, num_stages=1)
    table = dataclasses.replace(
        tuning.load_table("default"),
        segments=SegmentRule(tokens=32, max_segments=4, programs=64),
        latent_decode_attention=(tiles,),
        latent_prefill_attention=(tiles,),
    )
    monkeypatch.setattr(latent_attention, "table_of_device", lambda device: table)


def latent_case(rows: list[tuple[int, int]] = ROWS, num_heads: int = 4, **options: object) -> AttentionCase:
    return make_case(rows, num_heads=num_heads, num_kv_heads=1, head_dim=LATENT_DIM, **options)  # type: ignore[arg-type]


def attended(kernels: KernelBackend, case: AttentionCase, rank: int = RANK) -> torch.Tensor:
    return kernels.latent_attention(case.query, case.k_cache, case.metadata, case.scale, rank)


@pytest.mark.parametrize(
    ("num_heads", "dtype", "rank"), [(1, torch.float32, 36), (5, torch.float16, 32), (24, torch.float32, 32)]
)  # of 24 heads, a tile of 16 rows has a part
def test_values_are_the_first_numbers_of_each_latent(
    kernels: KernelBackend, num_heads: int, dtype: torch.dtype, rank: int
) -> None:
    case = latent_case(num_heads=num_heads, dtype=dtype)
    actual = attended(kernels, case, rank)
    assert actual.is_contiguous()
    wide = (case.query.float(), case.k_cache.float(), case.metadata, case.scale, rank)
    tolerance = 5e-6 if dtype == torch.float32 else 2e-3
    expected = reference.BACKEND.latent_attention(*wide)
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_heads", [2, 16, 40])
def test_rows_of_few_tokens_are_cut_as_those_of_one(kernels: KernelBackend, num_heads: int) -> None:
    query_len = kernels.short_query_len(num_heads)
    rows = [(1, 90), (min(query_len, 4), 130), (min(query_len, 2), 20), (21, 60)]
    case = latent_case(rows, num_heads, num_decode_rows=1, num_short_rows=2)
    expected = reference.BACKEND.latent_attention(case.query, case.k_cache, case.metadata, case.scale, RANK)
    torch.testing.assert_close(attended(kernels, case), expected, rtol=5e-6, atol=5e-6)


def test_a_query_has_the_same_bits_alone_in_a_batch_and_in_any_chunks(kernels: KernelBackend) -> None:
    case = latent_case()
    batched = attended(kernels, case)
    starts = case.metadata.query_start_loc.tolist()
    for row in range(len(ROWS)):
        length = starts[row + 1] - starts[row]
        for first, last in {(0, length), (length // 3, length // 2 + 1)}:
            query = case.query[starts[row] + first : starts[row] + last]
            metadata = dataclasses.replace(
                alone(case, row, first, last), num_decode_rows=int(row < case.metadata.num_decode_rows)
            )
            chunk = kernels.latent_attention(query, case.k_cache, metadata, case.scale, RANK)
            assert torch.equal(chunk, batched[starts[row] + first : starts[row] + last])
