from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda_kernels.reference import attention_plan
from pagoda_kernels.reference.attention_plan import CacheGeometry, plan_attention
from tests.ops.attention_cases import make_case

RAGGED = [(1, 1), (1, 8), (1, 17), (1, 64), (3, 3), (5, 30), (1, 9), (20, 20), (2, 33)]


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_ragged_batch_matches_the_float64_reference(block_size: int, head_dim: int) -> None:
    make_case(RAGGED, block_size=block_size, head_dim=head_dim).assert_matches()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (16, 2), (8, 1), (3, 1), (1, 1)])
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_grouped_heads_read_their_own_kv_head(num_heads: int, num_kv_heads: int, sliding_window: int | None) -> None:
    make_case(RAGGED, num_heads=num_heads, num_kv_heads=num_kv_heads).assert_matches(sliding_window)


def test_single_token_attends_to_itself() -> None:
    case = make_case([(1, 1)])
    torch.testing.assert_close(case.run(), case.values[0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("query_len", [1, 4])
def test_context_ends_anywhere_in_a_block(query_len: int) -> None:
    make_case([(query_len, seq_len) for seq_len in range(query_len, 4 * 8 + 2)]).assert_matches()


@pytest.mark.parametrize("sliding_window", [None, 3, 11])
def test_chunk_over_every_prefix_length(sliding_window: int | None) -> None:
    make_case([(5, prefix + 5) for prefix in range(27)]).assert_matches(sliding_window)


@pytest.mark.parametrize("sliding_window", [1, 2, 7, 8, 9, 16, 40, 1000])
def test_sliding_window_of_any_size(sliding_window: int) -> None:
    make_case(RAGGED).assert_matches(sliding_window)


def test_window_reads_no_block_before_it() -> None:
    case = make_case([(1, 60), (3, 60)], block_size=8, num_kv_heads=2)
    for row in range(2):
        blocks = case.metadata.block_table[row, :5].long()  # tokens 0 to 39; the windows begin at token 40 or later
        case.k_cache[blocks] = math.nan
        case.v_cache[blocks] = math.nan
    case.assert_matches(sliding_window=16)
    plan = plan_attention(case.metadata, CacheGeometry.of(case.k_cache), 16)
    assert [group.pages.numel() for group in plan.decode] == [2 * 3]
    assert [row.pages.numel() for row in plan.prefill] == [2 * 3]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_slots_of_no_token_never_change_a_bit(poison: float, sliding_window: int | None) -> None:
    clean = make_case(RAGGED, poison=0.0).run(sliding_window)
    assert torch.equal(make_case(RAGGED, poison=poison).run(sliding_window), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_half_precision_is_close(dtype: torch.dtype, sliding_window: int | None) -> None:
    tolerance = 1.6e-2 if dtype == torch.bfloat16 else 2e-3
    make_case(RAGGED, dtype=dtype, head_dim=64).assert_matches(sliding_window, tolerance=tolerance)


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_soft_cap_bounds_the_scores(sliding_window: int | None) -> None:
    case = make_case(RAGGED)
    case.assert_matches(sliding_window, soft_cap=1.5)
    assert not torch.allclose(case.run(soft_cap=1.5), case.run())


def test_single_token_rows_may_be_run_as_prefill_rows() -> None:
    as_decode, as_prefill = make_case(RAGGED), make_case(RAGGED, num_decode_rows=0)
    torch.testing.assert_close(as_prefill.run(), as_decode.run(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sliding_window", [None, 13])
def test_long_prompt_is_cut_into_tiles_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, sliding_window: int | None
) -> None:
    monkeypatch.setattr(attention_plan, "PREFILL_TILE", 8)
    make_case([(1, 20), (50, 50), (33, 70), (8, 8), (9, 40)]).assert_matches(sliding_window)


@pytest.mark.parametrize("sliding_window", [None, 13])
def test_decode_rows_are_grouped_without_a_seam(monkeypatch: pytest.MonkeyPatch, sliding_window: int | None) -> None:
    rows = [(1, seq_len) for seq_len in (3, 200, 40, 41, 1, 120, 64, 8, 7, 90, 199)]
    monkeypatch.setattr(attention_plan, "DECODE_WORKSPACE_BYTES", 1 << 14)
    case = make_case([*rows, (4, 50)])
    case.assert_matches(sliding_window)
    plan = plan_attention(case.metadata, CacheGeometry.of(case.k_cache), sliding_window)
    assert len(plan.decode) > 3
    assert plan.workspace.nbytes <= 200 * 2 * 2 * 16 * 4  # never more than the longest row alone


def test_decode_group_reads_at_most_twice_what_its_rows_hold() -> None:
    lengths = [1, 1, 2, 9, 70, 71, 300, 301, 600]
    case = make_case([(1, seq_len) for seq_len in lengths], num_kv_heads=1, num_heads=1)
    groups = plan_attention(case.metadata, CacheGeometry.of(case.k_cache), None).decode
    rows = [row for group in groups for row in torch.arange(len(lengths))[group.rows].tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    held = sum(-(-seq_len // 8) for seq_len in lengths)
    assert sum(group.pages.numel() for group in groups) <= 2 * held


def test_layers_with_different_windows_share_the_metadata() -> None:
    case = make_case(RAGGED)
    for sliding_window in (None, 4, None, 9, 4):
        case.assert_matches(sliding_window)


@st.composite
def ragged_batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    decode = draw(st.lists(st.integers(1, 70).map(lambda seq_len: (1, seq_len)), max_size=6))
    chunk = st.tuples(st.integers(1, 20), st.integers(0, 50)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    prefill = draw(st.lists(chunk, min_size=0 if decode else 1, max_size=4))
    return decode + prefill, len(decode)


@settings(max_examples=60, deadline=None)
@given(
    batch=ragged_batches(),
    block_size=st.sampled_from([1, 8, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    sliding_window=st.one_of(st.none(), st.integers(1, 40)),
    seed=st.integers(0, 2**31),
)
def test_any_batch_matches_the_float64_reference(
    batch: tuple[list[tuple[int, int]], int],
    block_size: int,
    heads: tuple[int, int],
    sliding_window: int | None,
    seed: int,
) -> None:
    rows, num_decode_rows = batch
    case = make_case(
        rows,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        block_size=block_size,
        num_decode_rows=num_decode_rows,
        seed=seed,
    )
    case.assert_matches(sliding_window)
