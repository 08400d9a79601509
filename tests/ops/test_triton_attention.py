from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from pagoda_kernels.reference.attention import to_float8
from tests.ops.attention_cases import AttentionCase, make_case
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

from pagoda_kernels.gpu import attention, tuning  # noqa: E402
from pagoda_kernels.gpu.attention import AttentionGeometry  # noqa: E402
from pagoda_kernels.gpu.tuning import AttentionTiles, SegmentRule, TuningTable  # noqa: E402
from pagoda_kernels.gpu.workspace import DecodeWorkspace  # noqa: E402

__all__ = ["kernels"]

DECODE = [(1, 1), (1, 8), (1, 17), (1, 64)]
CHUNKS = [(3, 3), (5, 30), (2, 33)]
HALF_TOLERANCE = 2e-3


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> TuningTable:
    """Tiles so small that short contexts have many of them, and segments of 32 tokens."""
    tiles = AttentionTiles(head_dim=256, element_bytes=4, rows=16, tile=16, num_warps=4, num_stages=1)
    table = TuningTable(
        name="small",
        note="",
        segments=SegmentRule(tokens=32, max_segments=4, programs=64),
        decode_attention=(tiles,),
        prefill_attention=(tiles,),
        latent_decode_attention=(tiles,),
        latent_prefill_attention=(tiles,),
    )
    monkeypatch.setattr(attention, "table_of_device", lambda device: table)
    return table


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_decode_rows_and_chunks_share_a_batch(sliding_window: int | None) -> None:
    make_case([*DECODE, *CHUNKS]).assert_matches(sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_token_attends_to_itself(dtype: torch.dtype) -> None:
    case = make_case([(1, 1)], dtype=dtype)
    torch.testing.assert_close(case.run(), case.values[0].repeat_interleave(2, dim=1))


def test_context_ends_anywhere_in_a_block(small_tiles: TuningTable) -> None:
    make_case([(1, seq_len) for seq_len in range(1, 2 * 8 + 2)], num_kv_heads=1).assert_matches()


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_chunk_over_every_prefix_length(small_tiles: TuningTable, sliding_window: int | None) -> None:
    make_case([(5, prefix + 5) for prefix in range(19)], num_heads=2, num_kv_heads=1).assert_matches(sliding_window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (5, 1), (7, 1), (16, 1), (32, 1)])
def test_any_number_of_heads_may_share_a_kv_head(num_heads: int, num_kv_heads: int) -> None:
    make_case([(1, 21), (9, 20)], num_heads=num_heads, num_kv_heads=num_kv_heads).assert_matches()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_dimensions(head_dim: int, dtype: torch.dtype) -> None:
    tolerance = HALF_TOLERANCE if dtype == torch.float16 else 5e-6
    case = make_case([(1, 21), (3, 20)], head_dim=head_dim, dtype=dtype, num_kv_heads=1)
    case.assert_matches(tolerance=tolerance)


@pytest.mark.parametrize("block_size", [1, 16, 32, 256])
def test_block_sizes(block_size: int) -> None:
    make_case([(1, 70), (5, 40)], block_size=block_size, num_kv_heads=1).assert_matches()


@pytest.mark.parametrize("sliding_window", [1, 7, 16, 33, 1000])
def test_sliding_window_of_any_size(small_tiles: TuningTable, sliding_window: int) -> None:
    make_case([(1, 70), (1, 9), (20, 61)], num_kv_heads=1).assert_matches(sliding_window)


def test_window_reads_no_block_before_it() -> None:
    case = make_case([(1, 60), (3, 60)], block_size=8, num_kv_heads=1)
    for row in range(2):
        blocks = case.metadata.block_table[row, :5].long()  # tokens 0 to 39; the windows begin at token 40 or later
        case.k_cache[blocks] = math.nan
        case.v_cache[blocks] = math.nan
    case.assert_matches(sliding_window=16)


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_soft_cap_bounds_the_scores(sliding_window: int | None) -> None:
    make_case([(1, 40), (5, 30)], num_kv_heads=1).assert_matches(sliding_window, soft_cap=1.5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_slots_of_no_token_never_change_a_bit(small_tiles: TuningTable, poison: float) -> None:
    rows = [(1, 9), (1, 50), (5, 30)]
    clean = make_case(rows, poison=0.0, num_kv_heads=1).run(13)
    assert torch.equal(make_case(rows, poison=poison, num_kv_heads=1).run(13), clean)


def test_129_blocks() -> None:
    make_case([(1, 129 * 16)], block_size=16, num_kv_heads=1, num_heads=2).assert_matches()


@pytest.mark.parametrize("sliding_window", [None, 50])
def test_split_contexts_are_put_together_without_a_seam(small_tiles: TuningTable, sliding_window: int | None) -> None:
    rows = [(1, seq_len) for seq_len in (1, 31, 32, 33, 64, 65, 97, 128, 129, 200)]
    make_case(rows, num_kv_heads=1, num_heads=3).assert_matches(sliding_window)


@pytest.mark.parametrize("programs", [1, 16, 10_000])
def test_the_number_of_programs_changes_no_bit(
    small_tiles: TuningTable, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    case = make_case([(1, seq_len) for seq_len in (1, 33, 97, 200)], num_kv_heads=1, num_heads=3)
    expected = case.run()
    rule = dataclasses.replace(small_tiles.segments, programs=programs)
    monkeypatch.setattr(attention, "table_of_device", lambda device: dataclasses.replace(small_tiles, segments=rule))
    assert torch.equal(case.run(), expected)


def test_programs_are_shared_out_by_rows_and_heads() -> None:
    geometry = AttentionGeometry(32, 8, 128, 16, None, False, False)
    rule = SegmentRule(tokens=256, max_segments=32, programs=8192)
    shares = {rows: geometry.programs_per_row(rows, 32, rule) for rows in (1, 16, 64, 256, 4096)}
    assert shares == {1: 32, 16: 32, 64: 16, 256: 4, 4096: 1}
    assert geometry.programs_per_row(1, 2, rule) == 2  # no context has more parts


def test_long_prompt_is_cut_into_tiles_without_a_seam(small_tiles: TuningTable) -> None:
    # 16 rows of 3 heads: tiles of 5 tokens, the last one of the first prompt with a single token in it.
    make_case([(1, 20), (26, 26), (9, 40), (1, 3)], num_heads=3, num_kv_heads=1, num_decode_rows=1).assert_matches()


def row_of(case: AttentionCase, row: int) -> AttentionCase:
    """The same request in a batch of its own, in the same blocks."""
    first, last = case.metadata.query_start_loc[row : row + 2].tolist()
    metadata = dataclasses.replace(
        case.metadata,
        query_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
        seq_lens=case.metadata.seq_lens[row : row + 1],
        block_table=case.metadata.block_table[row : row + 1],
        max_query_len=last - first,
        max_seq_len=int(case.metadata.seq_lens[row]),
        num_decode_rows=int(row < case.metadata.num_decode_rows),
        num_short_rows=int(
            0 <= row - case.metadata.num_decode_rows < case.metadata.num_short_rows,
        ),
        derived={},
    )
    return dataclasses.replace(case, query=case.query[first:last], metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sliding_window", [None, 40])
def test_a_row_is_the_same_to_the_bit_alone_and_in_a_batch(
    small_tiles: TuningTable, dtype: torch.dtype, sliding_window: int | None
) -> None:
    case = make_case([(1, 200), (1, 9), (1, 70), (9, 60), (20, 20)], num_heads=3, num_kv_heads=1, dtype=dtype)
    together = case.run(sliding_window)
    starts = case.metadata.query_start_loc.tolist()
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        assert torch.equal(row_of(case, row).run(sliding_window), together[first:last])


@pytest.mark.parametrize(
    ("query_len", "num_heads", "num_kv_heads", "sliding_window"),
    [
        (1, 3, 1, None),
        (2, 8, 1, 21),
        (3, 2, 2, None),
        (4, 3, 1, 21),
        (5, 8, 1, None),
        (6, 2, 2, 30),
        (7, 3, 1, None),
        (8, 8, 1, 5),
    ],
)
def test_rows_of_few_tokens_are_cut_into_segments_and_see_what_is_before_them(
    small_tiles: TuningTable, query_len: int, num_heads: int, num_kv_heads: int, sliding_window: int | None
) -> None:
    lengths = [(query_len, seq_len) for seq_len in (query_len, 31, 33, 64 + query_len, 130)]
    rows = [(1, 40), *lengths, (2, 2), (11, 50)]
    case = make_case(
        rows, num_heads=num_heads, num_kv_heads=num_kv_heads, num_decode_rows=1, num_short_rows=len(lengths) + 1
    )
    case.assert_matches(sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_of_few_tokens_is_the_same_to_the_bit_alone_and_in_a_batch(
    small_tiles: TuningTable, dtype: torch.dtype
) -> None:
    rows = [(1, 70), (4, 200), (2, 9), (5, 70), (7, 7), (20, 20)]
    case = make_case(rows, num_heads=3, num_kv_heads=1, dtype=dtype, num_short_rows=4)
    together = case.run(40)
    starts = case.metadata.query_start_loc.tolist()
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        assert torch.equal(row_of(case, row).run(40), together[first:last])


def test_slots_of_no_token_never_change_a_bit_of_a_row_of_few_tokens(small_tiles: TuningTable) -> None:
    rows = [(3, 9), (2, 50), (5, 30)]
    clean = make_case(rows, poison=0.0, num_kv_heads=1, num_short_rows=3).run(13)
    assert torch.equal(make_case(rows, num_kv_heads=1, num_short_rows=3).run(13), clean)


def test_upper_bounds_of_lengths_change_nothing(small_tiles: TuningTable) -> None:
    case = make_case([(1, 70), (1, 9), (4, 30)], num_kv_heads=1)
    loose = dataclasses.replace(case.metadata, max_seq_len=4096, max_query_len=512, derived={})
    assert torch.equal(dataclasses.replace(case, metadata=loose).run(), case.run())


def test_rows_of_padding_change_no_other_row() -> None:
    """As a CUDA graph pads its batch: rows of the null block, of one token, and rows that hold none at all."""
    case = make_case([(1, 21), (1, 40)], num_kv_heads=1)
    expected = case.run()
    metadata = dataclasses.replace(
        case.metadata,
        query_start_loc=torch.arange(5, dtype=torch.int32),
        seq_lens=torch.cat((case.metadata.seq_lens, torch.tensor([1, 0], dtype=torch.int32))),
        block_table=torch.nn.functional.pad(case.metadata.block_table, (0, 0, 0, 2)),
        num_decode_rows=4,
        derived={},
    )
    case.k_cache[0], case.v_cache[0] = 0.0, 0.0
    query = torch.cat((case.query, torch.randn(2, *case.query.shape[1:])))
    padded = dataclasses.replace(case, query=query, metadata=metadata).run()
    assert torch.equal(padded[:2], expected)
    assert torch.isfinite(padded[2]).all()
    assert torch.equal(padded[3], torch.zeros_like(padded[3]))


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def in_float8(case: AttentionCase, dtype: torch.dtype, kv_scales: tuple[float, float]) -> AttentionCase:
    """The same batch with its caches as `dtype`; what is expected of it is computed from what rounding has left."""
    k_scale, v_scale = kv_scales
    return dataclasses.replace(
        case,
        k_cache=to_float8(case.k_cache, k_scale, dtype),
        v_cache=to_float8(case.v_cache, v_scale, dtype),
        keys=[to_float8(keys, k_scale, dtype).double() * k_scale for keys in case.keys],
        values=[to_float8(values, v_scale, dtype).double() * v_scale for values in case.values],
        kv_scales=kv_scales,
    )


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize(("query_dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, HALF_TOLERANCE)])
def test_float8_cache_is_what_rounding_left_times_its_scales(
    dtype: torch.dtype, query_dtype: torch.dtype, tolerance: float
) -> None:
    case = in_float8(make_case([*DECODE, *CHUNKS], dtype=query_dtype, head_dim=32), dtype, (0.25, 0.3))
    case.assert_matches(tolerance=tolerance)


def test_float8_cache_in_segments_behind_a_window_and_under_a_cap(small_tiles: TuningTable) -> None:
    rows = [(1, seq_len) for seq_len in (1, 33, 97, 200)]
    case = in_float8(make_case([*rows, (20, 61)], num_heads=3, num_kv_heads=1), torch.float8_e4m3fn, (0.5, 2.0))
    case.assert_matches(50)
    case.assert_matches(soft_cap=1.5)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_slots_of_no_token_never_change_a_bit(dtype: torch.dtype) -> None:
    rows = [(1, 9), (1, 50), (5, 30)]
    clean, poisoned = (
        in_float8(make_case(rows, poison=poison, num_kv_heads=1, dtype=torch.float16), dtype, (1.0, 1.0))
        for poison in (0.0, math.nan)
    )
    assert poisoned.k_cache.float().isnan().any()
    assert torch.equal(poisoned.run(13), clean.run(13))


@pytest.mark.parametrize("greatest", [0.0, 1e-6, 3e5])
def test_queries_that_float16_does_not_hold_meet_a_float8_cache(greatest: float) -> None:
    case = in_float8(make_case([(1, 40), (5, 30)], num_kv_heads=1), torch.float8_e4m3fn, (1 / 4096, 1.0))
    query = (case.query / case.query.abs().max() * greatest).bfloat16()
    case = dataclasses.replace(case, query=query)
    actual, expected = case.run().double(), case.expected()
    # bfloat16 cuts the result off to eight bits in the interpreter, and 3e5 makes of softmax nearly a choice of one.
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_workspace_keeps_what_it_outgrew() -> None:
    workspace, segments, cpu = (
        DecodeWorkspace(),
        SegmentRule(tokens=32, max_segments=4, programs=64),
        torch.device("cpu"),
    )
    small = workspace.partials(2, 3, segments, 16, cpu)
    held = workspace.reserve(8, 3, segments, 16, cpu)
    large = workspace.partials(8, 3, segments, 16, cpu)
    assert [part.shape for part in large] == [(8, 3, 4, 16), (8, 3, 4), (8, 3, 4)]
    assert all(part.is_contiguous() for part in (*small, *large))
    assert large[0].data_ptr() != small[0].data_ptr()
    assert held == 4 * (2 + 8) * 3 * 4 * 18
    assert workspace.reserve(8, 3, segments, 16, cpu) == held


def test_workspace_reserved_for_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration says `cuda`, a query `cuda:1`: with two buffers the one reserved would never be used."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    made: list[torch.device] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(device)
        return torch.zeros(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    workspace, segments = DecodeWorkspace(), SegmentRule(tokens=32, max_segments=4, programs=64)
    workspace.reserve(8, 3, segments, 16, torch.device("cuda"))
    workspace.partials(8, 3, segments, 16, torch.device("cuda:1"))
    assert len(made) == 1


def test_tables_are_found_by_capability() -> None:
    names = {
        capability: tuning.table_name(capability) for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (99, 0)]
    }
    assert list(names.values()) == ["default", "sm_80", "sm_89", "sm_89", "sm_90", "default"]
    assert tuning.table_of_device(torch.device("cpu")).name == "default"


@pytest.mark.parametrize("name", ["default", "sm_80", "sm_89", "sm_90"])
def test_every_table_serves_every_head_dimension(name: str) -> None:
    table = tuning.load_table(name)
    assert table.note
    for head_dim in (16, 64, 80, 96, 128, 192, 256):
        for element_bytes in (2, 4):
            for tiles in (table.decode_tiles(head_dim, element_bytes), table.prefill_tiles(head_dim, element_bytes)):
                assert tiles.head_dim >= head_dim
    with pytest.raises(ValueError, match=rf"{name}.*512 x 2"):
        table.decode_tiles(512, 2)
