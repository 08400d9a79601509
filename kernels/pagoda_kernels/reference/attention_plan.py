"""How the torch attention walks a batch: worked out once a step, used by every layer.

A *page* is what one block holds for one KV head: `block_size` consecutive keys (or values) of `head_dim` numbers. A cache
`[num_blocks, num_kv_heads, block_size, head_dim]` is a list of pages, and page `block * num_kv_heads + head` is one row of
`cache.view(-1, block_size * head_dim)`. Gathering pages in the order (row, head, block) gives `[rows, heads, keys, head_dim]`
in one copy.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch

from pagoda_kernels.types import AttentionMetadata

# Keys and values that a group of decode rows gathers at a time. Small enough to stay in a CPU's cache between the gather
# and the attention that reads it, large enough that the calls around it do not count.
DECODE_WORKSPACE_BYTES = 4 << 20

# Queries of one prefill row that are attended together; keys after the tile's last query are not looked at.
PREFILL_TILE = 256


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """Shape and type of a layer's KV cache; equal for all layers of a model."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, k_cache: torch.Tensor) -> CacheGeometry:
        """The geometry of `k_cache` [num_blocks, num_kv_heads, block_size, head_dim]."""
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        return cls(num_kv_heads, block_size, head_dim, k_cache.dtype, k_cache.device)

    def pages_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of blocks [..., n], flattened in the order (..., head, n)."""
        heads = torch.arange(self.num_kv_heads, device=blocks.device).unsqueeze(-1)
        return (blocks.long().unsqueeze(-2) * self.num_kv_heads + heads).flatten()


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """C decode rows that are gathered and attended together, each with B blocks (shorter rows are padded).

    Attributes:
        rows: which rows of the batch; a slice where they stand in order.
        num_rows: C.
        pages: int64 [C * num_kv_heads * B].
        first_key, num_keys: the part of the B * block_size gathered keys that any row needs.
        mask: additive [C, 1, 1, num_keys], 0 or -inf; None where every row sees every key of that part.
        foreign_slots: slots of the gathered keys followed by values, as rows of `head_dim`, that belong to no token the
            row may see. They may hold anything, so they are zeroed; None where the mask is.
    """

    rows: slice | torch.Tensor
    num_rows: int
    pages: torch.Tensor
    first_key: int
    num_keys: int
    mask: torch.Tensor | None
    foreign_slots: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Queries `start .. stop - 1` of the batch, which see keys `first_key .. last_key - 1` of their row's gathered keys."""

    start: int
    stop: int
    first_key: int
    last_key: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One request with several query tokens: its pages [num_kv_heads * B] and the tiles of its queries."""

    pages: torch.Tensor
    tiles: list[PrefillTile]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The whole batch: every row is in exactly one decode group or is one prefill row.

    `workspace` [2, pages, block_size * head_dim] takes the keys and the values of one decode group at a time.
    """

    decode: list[DecodeGroup]
    prefill: list[PrefillRow]
    workspace: torch.Tensor


def plan_attention(metadata: AttentionMetadata, geometry: CacheGeometry, sliding_window: int | None) -> AttentionPlan:
    """The plan for layers with this geometry and window; the second call with the same arguments is a look-up."""
    key = (geometry, sliding_window)
    plan: AttentionPlan | None = metadata.derived.get(key)
    if plan is None:
        decode = _decode_groups(metadata, geometry, sliding_window)
        prefill = _prefill_rows(metadata, geometry, sliding_window)
        largest = max((group.pages.numel() for group in decode), default=0)
        workspace = torch.empty(
            (2, largest, geometry.block_size * geometry.head_dim), dtype=geometry.dtype, device=geometry.device
        )
        plan = metadata.derived[key] = AttentionPlan(decode, prefill, workspace)
    return plan


def _decode_groups(
    metadata: AttentionMetadata, geometry: CacheGeometry, sliding_window: int | None
) -> list[DecodeGroup]:
    """Decode rows by falling length, so that padding at most doubles what a group reads, in groups of bounded size."""
    num_rows = metadata.num_decode_rows
    if num_rows == 0:
        return []
    ends = metadata.seq_lens[:num_rows].long()
    starts = torch.zeros_like(ends) if sliding_window is None else (ends - sliding_window).clamp_(min=0)
    first_blocks = starts // geometry.block_size
    num_blocks = (ends - 1) // geometry.block_size + 1 - first_blocks
    counts_tensor, order = torch.sort(num_blocks, descending=True, stable=True)
    counts = counts_tensor.tolist()

    page_bytes = geometry.block_size * geometry.head_dim * geometry.dtype.itemsize
    block_bytes = 2 * geometry.num_kv_heads * page_bytes
    groups = []
    begin = 0
    while begin < num_rows:
        longest = counts[begin]
        fitting = max(1, DECODE_WORKSPACE_BYTES // (longest * block_bytes))
        # Rows of at least half the length: counts fall, so their negatives rise, as bisect needs.
        long_enough = bisect_right(counts, -((longest + 1) // 2), lo=begin, key=lambda count: -count)
        end = min(begin + fitting, long_enough)
        in_order = begin == 0 and end == num_rows
        rows = slice(0, num_rows) if in_order else order[begin:end]
        spans = starts[rows], ends[rows], first_blocks[rows]
        groups.append(_decode_group(metadata, geometry, rows, spans, longest))
        begin = end
    return groups


def _decode_group(
    metadata: AttentionMetadata,
    geometry: CacheGeometry,
    rows: slice | torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_blocks: int,
) -> DecodeGroup:
    starts, ends, first_blocks = spans
    num_rows = starts.numel()
    table = metadata.block_table[rows]
    columns = first_blocks.unsqueeze(1) + torch.arange(num_blocks, device=table.device)
    blocks = table.gather(1, columns.clamp(max=table.shape[1] - 1))

    # Where the rows' spans lie in the gathered keys, and the part of those that any row needs.
    offsets = first_blocks * geometry.block_size
    low, high = starts - offsets, ends - offsets
    bounds = torch.stack((low.amin(), low.amax(), high.amin(), high.amax())).tolist()
    first_key, last_key = bounds[0], bounds[3]
    mask = foreign_slots = None
    if bounds[0] != bounds[1] or bounds[2] != bounds[3]:
        positions = torch.arange(num_blocks * geometry.block_size, device=table.device)
        seen = (positions >= low.unsqueeze(1)) & (positions < high.unsqueeze(1))
        mask = torch.zeros(seen.shape, dtype=geometry.dtype, device=table.device).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None, first_key:last_key].contiguous()
        hidden = ~seen[:, None, :].expand(-1, geometry.num_kv_heads, -1).flatten()
        foreign_slots = hidden.repeat(2).nonzero().squeeze(1)
    return DecodeGroup(
        rows=rows,
        num_rows=num_rows,
        pages=geometry.pages_of(blocks),
        first_key=first_key,
        num_keys=last_key - first_key,
        mask=mask,
        foreign_slots=foreign_slots,
    )


def _prefill_rows(metadata: AttentionMetadata, geometry: CacheGeometry, sliding_window: int | None) -> list[PrefillRow]:
    """Every row after the decode rows, cut into tiles of queries.

    All tiles share one band of a causal mask, since what a query sees depends only on how far back a key lies. With
    `prefix` keys before the first query of a tile, the tile's mask is a window of the band:

        band[i, x] is open  ⇔  x - prefix_max <= i and x - prefix_max > i - sliding_window
        mask = band[:, prefix_max - prefix : prefix_max + queries]
    """
    num_rows = metadata.seq_lens.numel()
    if metadata.num_decode_rows == num_rows:
        return []
    seq_lens = metadata.seq_lens[metadata.num_decode_rows :].tolist()
    query_starts = metadata.query_start_loc[metadata.num_decode_rows :].tolist()
    tile = min(PREFILL_TILE, metadata.max_query_len)
    prefix_max = metadata.max_seq_len if sliding_window is None else min(metadata.max_seq_len, sliding_window)
    band = _causal_band(tile, prefix_max, sliding_window, geometry)

    rows = []
    for index, seq_len in enumerate(seq_lens):
        query_start, query_stop = query_starts[index], query_starts[index + 1]
        context = seq_len - (query_stop - query_start)
        first_seen = 0 if sliding_window is None else max(0, context - sliding_window + 1)
        first_block = first_seen // geometry.block_size
        last_block = (seq_len - 1) // geometry.block_size
        gathered_from = first_block * geometry.block_size
        tiles = []
        for start in range(query_start, query_stop, tile):
            stop = min(start + tile, query_stop)
            position = context + start - query_start
            first_key = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            prefix = position - first_key
            tiles.append(
                PrefillTile(
                    start=start,
                    stop=stop,
                    first_key=first_key - gathered_from,
                    last_key=position + stop - start - gathered_from,
                    mask=band[: stop - start, prefix_max - prefix : prefix_max + stop - start],
                )
            )
        blocks = metadata.block_table[metadata.num_decode_rows + index, first_block : last_block + 1]
        rows.append(PrefillRow(geometry.pages_of(blocks), tiles))
    return rows


def _causal_band(
    num_queries: int, prefix_max: int, sliding_window: int | None, geometry: CacheGeometry
) -> torch.Tensor:
    queries = torch.arange(num_queries, device=geometry.device).unsqueeze(1)
    distance = queries - (torch.arange(prefix_max + num_queries, device=geometry.device) - prefix_max)
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    return torch.zeros(seen.shape, dtype=geometry.dtype, device=geometry.device).masked_fill_(~seen, float("-inf"))
