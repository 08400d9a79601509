"""Launching paged attention: which configuration runs on which grid, without asking the device anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.attention_kernels import paged_attention_kernel, reduce_segments_kernel
from pagoda_kernels.gpu.tuning import AttentionTiles, SegmentRule, element_bytes, table_of_device
from pagoda_kernels.gpu.workspace import DECODE_WORKSPACE
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata

# Queries and heads of a short row in one tile. The same for all, so that a row's result does not depend on its company.
SHORT_TILE_ROWS = 64
# Tokens that short rows may have together, which bounds the workspace: more rows than that fill a GPU without being cut.
SHORT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """What of an attention layer the kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None
    has_soft_cap: bool
    has_sinks: bool

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> AttentionGeometry:
        """The geometry of a call of `paged_attention`."""
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        has_sinks = sinks is not None
        return cls(query.shape[1], num_kv_heads, head_dim, block_size, sliding_window, soft_cap is not None, has_sinks)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def tile_rows(self, tiles: AttentionTiles) -> int:
        """Rows of a query tile: those of the table, or more where one token has more heads."""
        needed: int = triton.next_power_of_2(self.heads_per_kv)
        return max(tiles.rows, needed)

    def constants(
        self, tiles: AttentionTiles, segments: SegmentRule, *, decode: bool, short: bool = False
    ) -> dict[str, int | bool]:
        """The constants of `paged_attention_kernel`; `short`: of rows with several tokens that are cut as in decode."""
        return {
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEADS_PER_KV": self.heads_per_kv,
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": max(16, triton.next_power_of_2(self.head_dim)),
            "BLOCK_SIZE": self.block_size,
            "WINDOW": self.sliding_window or 0,
            "HAS_SOFT_CAP": self.has_soft_cap,
            "HAS_SINKS": self.has_sinks,
            "DECODE": decode or short,
            "QUERY_LEN": short_query_len(self.heads_per_kv) if short else 1,
            "ROWS": SHORT_TILE_ROWS if short else self.tile_rows(tiles),
            "TILE": tiles.tile,
            "SEGMENT_TOKENS": segments.tokens,
            "MAX_SEGMENTS": segments.max_segments if decode or short else 1,
        }

    def reduce_constants(self, segments: SegmentRule, *, short: bool = False) -> dict[str, int | bool]:
        """The constants of `reduce_segments_kernel`."""
        return reduce_constants(
            self.num_heads,
            self.head_dim,
            segments,
            query_len=short_query_len(self.heads_per_kv) if short else 1,
            window=self.sliding_window,
            has_sinks=self.has_sinks,
        )

    def most_segments(self, max_seq_len: int, segments: SegmentRule, query_len: int = 1) -> int:
        """The most segments that a row of up to `max_seq_len` tokens, `query_len` of them queries, is cut into."""
        return segments.most_segments(min(max_seq_len, (self.sliding_window or max_seq_len) + query_len - 1))

    def programs_per_row(self, num_rows: int, num_segments: int, segments: SegmentRule) -> int:
        """How many programs share the up to `num_segments` parts of a row, of each KV head."""
        return segments.programs_per_row(num_rows * self.num_kv_heads, num_segments)


class TritonAttention(KernelBackend):
    """Attention in up to three launches, for decode rows, short rows and the others; no length is read from the device.

    The order in which a decode row's sums are taken depends on its own length only; `AttentionMetadata.max_seq_len` and
    `max_query_len` may be any upper bounds.
    """

    @override
    def paged_attention(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        kv_scales: tuple[float, float] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        geometry = AttentionGeometry.of(query, k_cache, sliding_window, soft_cap, sinks)
        unused = DECODE_WORKSPACE.unused(query.device)[0]
        tensors = (
            unused if sinks is None else sinks,
            query,
            k_cache,
            v_cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
        )
        scales = (scale, soft_cap or 0.0, *(kv_scales or (1.0, 1.0)))
        if metadata.num_decode_rows:
            _decode(output, tensors, scales, metadata, geometry)
        if metadata.num_short_rows:
            _decode(output, tensors, scales, metadata, geometry, short=True)
        if metadata.num_decode_rows + metadata.num_short_rows < metadata.seq_lens.numel():
            _prefill(output, tensors, scales, metadata, geometry)
        return output

    @override
    def short_query_len(self, heads_per_kv: int) -> int:
        return short_query_len(heads_per_kv)

    @override
    def max_short_rows(self, heads_per_kv: int) -> int:
        query_len = short_query_len(heads_per_kv)
        return SHORT_TOKENS // query_len if query_len > 1 else 0

    @override
    def reserve_workspace(self, max_num_seqs: int, num_heads: int, head_dim: int, device: torch.device) -> int:
        num_tokens = max(max_num_seqs, SHORT_TOKENS)
        return DECODE_WORKSPACE.reserve(num_tokens, num_heads, table_of_device(device).segments, head_dim, device)


def short_query_len(heads_per_kv: int) -> int:
    """The most tokens of a row in one tile of `SHORT_TILE_ROWS`; see `KernelBackend.short_query_len`."""
    return max(1, SHORT_TILE_ROWS // heads_per_kv)


def reduce_constants(
    num_heads: int,
    head_dim: int,
    segments: SegmentRule,
    *,
    query_len: int = 1,
    window: int | None = None,
    has_sinks: bool = False,
) -> dict[str, int | bool]:
    """The constants of `reduce_segments_kernel`, for rows of up to `query_len` tokens."""
    return {
        "QUERY_LEN": query_len,
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "WINDOW": window or 0,
        "HAS_SINKS": has_sinks,
        "SEGMENT_TOKENS": segments.tokens,
        "MAX_SEGMENTS": segments.max_segments,
    }


def _decode(
    output: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    scales: tuple[float, float, float, float],
    metadata: AttentionMetadata,
    geometry: AttentionGeometry,
    *,
    short: bool = False,
) -> None:
    sinks, query, k_cache, _, block_table, seq_lens, query_start_loc = tensors
    table = table_of_device(query.device)
    chosen = table.prefill_tiles if short else table.decode_tiles
    tiles = chosen(geometry.head_dim, element_bytes(query.dtype, k_cache.dtype))
    first_row, num_rows = (
        (metadata.num_decode_rows, metadata.num_short_rows) if short else (0, metadata.num_decode_rows)
    )
    query_len = short_query_len(geometry.heads_per_kv) if short else 1
    num_segments = geometry.most_segments(metadata.max_seq_len, table.segments, query_len)
    partials = DECODE_WORKSPACE.partials(
        num_rows * query_len, geometry.num_heads, table.segments, geometry.head_dim, query.device
    )
    num_programs = geometry.programs_per_row(num_rows, num_segments, table.segments)
    paged_attention_kernel[(num_rows, geometry.num_kv_heads, num_programs)](
        output,
        *partials,
        *tensors,
        first_row,
        first_row + num_rows,
        *scales,
        query.stride(0),
        block_table.stride(0),
        **geometry.constants(tiles, table.segments, decode=not short, short=short),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_segments > 1:
        reduce_segments_kernel[(num_rows, geometry.num_heads, query_len)](
            output,
            *partials,
            sinks,
            seq_lens,
            query_start_loc,
            first_row,
            scales[-1],
            **geometry.reduce_constants(table.segments, short=short),
            num_warps=REDUCE_WARPS,
        )


def _prefill(
    output: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    scales: tuple[float, float, float, float],
    metadata: AttentionMetadata,
    geometry: AttentionGeometry,
) -> None:
    _, query, k_cache, _, block_table, seq_lens, _ = tensors
    table = table_of_device(query.device)
    tiles = table.prefill_tiles(geometry.head_dim, element_bytes(query.dtype, k_cache.dtype))
    tokens_per_tile = geometry.tile_rows(tiles) // geometry.heads_per_kv
    first_row, num_rows = metadata.num_decode_rows + metadata.num_short_rows, seq_lens.numel()
    # An upper bound that needs no length from the device; see `first_tile_of`.
    num_tiles = (query.shape[0] - first_row) // tokens_per_tile + num_rows - first_row
    unused = DECODE_WORKSPACE.unused(query.device)
    paged_attention_kernel[(num_tiles, geometry.num_kv_heads)](
        output,
        *unused,
        *tensors,
        first_row,
        num_rows,
        *scales,
        query.stride(0),
        block_table.stride(0),
        **geometry.constants(tiles, table.segments, decode=False),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# A program of the reduction reads at most 32 x 256 numbers.
REDUCE_WARPS = 4
