"""Launching attention over latent vectors; what it shares with paged attention is in `gpu.attention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.attention import reduce_constants, short_query_len
from pagoda_kernels.gpu.attention_kernels import reduce_segments_kernel
from pagoda_kernels.gpu.latent_attention_kernels import latent_attention_kernel
from pagoda_kernels.gpu.tuning import AttentionTiles, SegmentRule, TuningTable, table_of_device
from pagoda_kernels.gpu.workspace import DECODE_WORKSPACE
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata

# A program of the reduction reads at most 32 x 512 numbers.
REDUCE_WARPS = 8


@dataclass(frozen=True, slots=True)
class LatentGeometry:
    """What of a layer the kernel is compiled for."""

    num_heads: int
    latent_dim: int
    rank: int
    block_size: int

    @property
    def short_query_len(self) -> int:
        """Tokens of a short row, whose heads all read one latent."""
        return short_query_len(self.num_heads)

    def tile_rows(self, tiles: AttentionTiles, query_len: int) -> int:
        """Rows of a query tile: those of the table, or more where `query_len` tokens need them."""
        needed: int = triton.next_power_of_2(query_len)
        return max(tiles.rows, needed)

    def tile_heads(self, tiles: AttentionTiles, query_len: int) -> int:
        """Heads of each of `query_len` or more tokens in a query tile."""
        return min(self.num_heads, self.tile_rows(tiles, query_len) // query_len)

    def constants(
        self, tiles: AttentionTiles, segments: SegmentRule, *, decode: bool, query_len: int = 1
    ) -> dict[str, int | bool]:
        """The constants of `latent_attention_kernel`; with `decode`, of rows of up to `query_len` tokens."""
        rope_dim = self.latent_dim - self.rank
        return {
            "NUM_HEADS": self.num_heads,
            "TILE_HEADS": self.tile_heads(tiles, query_len),
            "RANK": self.rank,
            "PADDED_RANK": max(16, triton.next_power_of_2(self.rank)),
            "ROPE_DIM": rope_dim,
            "PADDED_ROPE": max(16, triton.next_power_of_2(rope_dim)),
            "BLOCK_SIZE": self.block_size,
            "DECODE": decode,
            "QUERY_LEN": query_len,
            "ROWS": self.tile_rows(tiles, query_len),
            "TILE": tiles.tile,
            "SEGMENT_TOKENS": segments.tokens,
            "MAX_SEGMENTS": segments.max_segments if decode else 1,
        }


class TritonLatentAttention(KernelBackend):
    """As `TritonAttention`, in up to three launches."""

    @override
    def latent_attention(
        self, query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float, rank: int
    ) -> torch.Tensor:
        num_tokens, num_heads, latent_dim = query.shape
        output = torch.empty((num_tokens, num_heads, rank), dtype=query.dtype, device=query.device)
        geometry = LatentGeometry(num_heads, latent_dim, rank, cache.shape[2])
        launch = _Launch(output, query, cache, metadata, scale, geometry, table_of_device(query.device))
        if metadata.num_decode_rows:
            launch.decode(0, metadata.num_decode_rows, 1)
        if metadata.num_short_rows:
            launch.decode(metadata.num_decode_rows, metadata.num_short_rows, geometry.short_query_len)
        first_row = metadata.num_decode_rows + metadata.num_short_rows
        if first_row < metadata.seq_lens.numel():
            launch.prefill(first_row)
        return output


@dataclass(frozen=True, slots=True)
class _Launch:
    """One call, and what its launches have in common."""

    output: torch.Tensor
    query: torch.Tensor
    cache: torch.Tensor
    metadata: AttentionMetadata
    scale: float
    geometry: LatentGeometry
    table: TuningTable

    def decode(self, first_row: int, num_rows: int, query_len: int) -> None:
        """Rows of up to `query_len` tokens, their contexts cut into segments."""
        geometry, segments = self.geometry, self.table.segments
        chosen = self.table.latent_prefill_tiles if query_len > 1 else self.table.latent_decode_tiles
        tiles = chosen(geometry.latent_dim, self.query.dtype.itemsize)
        num_groups = triton.cdiv(geometry.num_heads, geometry.tile_heads(tiles, query_len))
        num_segments = segments.most_segments(self.metadata.max_seq_len)
        partials = DECODE_WORKSPACE.partials(
            num_rows * query_len, geometry.num_heads, segments, geometry.rank, self.query.device
        )
        num_programs = segments.programs_per_row(num_rows * num_groups, num_segments)
        self._attend((num_rows, num_groups, num_programs), partials, first_row, num_rows, tiles, True, query_len)
        if num_segments > 1:
            reduce_segments_kernel[(num_rows, geometry.num_heads, query_len)](
                self.output,
                *partials,
                partials[0],
                self.metadata.seq_lens,
                self.metadata.query_start_loc,
                first_row,
                1.0,
                **reduce_constants(geometry.num_heads, geometry.rank, segments, query_len=query_len),
                num_warps=REDUCE_WARPS,
            )

    def prefill(self, first_row: int) -> None:
        """All rows from `first_row` on, of any number of tokens."""
        geometry, num_rows = self.geometry, self.metadata.seq_lens.numel()
        tiles = self.table.latent_prefill_tiles(geometry.latent_dim, self.query.dtype.itemsize)
        heads = geometry.tile_heads(tiles, 1)
        # An upper bound that needs no length from the device; see `first_tile_of`.
        num_tiles = (len(self.query) - first_row) // (geometry.tile_rows(tiles, 1) // heads) + num_rows - first_row
        grid = (num_tiles, triton.cdiv(geometry.num_heads, heads))
        unused = DECODE_WORKSPACE.unused(self.query.device)
        self._attend(grid, unused, first_row, num_rows - first_row, tiles, False, 1)

    def _attend(
        self,
        grid: tuple[int, ...],
        partials: tuple[torch.Tensor, ...],
        first_row: int,
        num_rows: int,
        tiles: AttentionTiles,
        decode: bool,
        query_len: int,
    ) -> None:
        block_table = self.metadata.block_table
        latent_attention_kernel[grid](
            self.output,
            *partials,
            self.query,
            self.cache,
            block_table,
            self.metadata.seq_lens,
            self.metadata.query_start_loc,
            first_row,
            first_row + num_rows,
            self.scale,
            block_table.stride(0),
            **self.geometry.constants(tiles, self.table.segments, decode=decode, query_len=query_len),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
