"""What the tuner measures: entries of a table in the order of their worth, candidates, and shapes that stand for serving."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pagoda_kernels.gpu.tuning import AttentionTiles, SegmentRule, TuningTable

# In the order of worth: half-precision caches first, then float8, then float32; heads as most models have them first.
HEAD_DIMS = (128, 64, 256)
ELEMENT_BYTES = (2, 1, 4)
# From these capabilities on: bfloat16 and asynchronous copies; conversions from float8.
AMPERE, ADA = (8, 0), (8, 9)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a table: `kind` is decode or prefill."""

    kind: str
    head_dim: int
    element_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.head_dim} x {self.element_bytes} bytes"

    def present(self, table: TuningTable) -> AttentionTiles:
        """What `table` says of it; of a wider entry if it has none of its own."""
        chosen = table.decode_tiles if self.kind == "decode" else table.prefill_tiles
        found = chosen(self.head_dim, self.element_bytes)
        return replace(found, head_dim=self.head_dim, element_bytes=self.element_bytes)

    def put(self, table: TuningTable, tiles: AttentionTiles) -> TuningTable:
        """`table` with `tiles` for this entry, in the place of what it had or beside it."""
        name = f"{self.kind}_attention"
        others: tuple[AttentionTiles, ...] = getattr(table, name)
        mine = (tiles.head_dim, tiles.element_bytes)
        kept = [one for one in others if (one.head_dim, one.element_bytes) != mine]
        ordered = sorted([*kept, tiles], key=lambda one: (one.element_bytes, one.head_dim))
        return replace(table, **{name: tuple(ordered)})


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch of `rows` equal rows. `weight`: its part in the geometric mean of times by which candidates are compared."""

    heads: int
    kv_heads: int
    query_len: int
    seq_len: int
    rows: int
    weight: float


# The first are those by which most candidates are sorted out: long enough to tell them apart, and the commonest.
DECODE_SHAPES = (
    Shape(32, 8, 1, 2048, 64, 3),
    Shape(32, 8, 1, 8192, 64, 2),
    Shape(64, 8, 1, 2048, 64, 2),
    Shape(32, 8, 1, 512, 256, 2),
    Shape(32, 8, 1, 2048, 256, 2),
    Shape(64, 8, 1, 8192, 16, 1),
    Shape(32, 8, 1, 32768, 16, 1),
    Shape(32, 8, 1, 2048, 4, 1),
    Shape(32, 8, 1, 8192, 1, 1),
    Shape(32, 8, 1, 512, 1, 0.5),
)
PREFILL_SHAPES = (
    Shape(32, 8, 2048, 2048, 4, 3),
    Shape(32, 8, 2048, 16384, 2, 2),
    Shape(64, 8, 2048, 2048, 2, 2),
    Shape(32, 8, 512, 512, 16, 2),
    Shape(32, 8, 8192, 8192, 1, 1),
    Shape(32, 8, 512, 8192, 4, 1),
    Shape(32, 8, 256, 1024, 16, 1),
)
TINY_SHAPES = {
    "decode": (Shape(4, 2, 1, 40, 2, 1), Shape(4, 2, 1, 20, 1, 1)),
    "prefill": (Shape(4, 2, 8, 12, 2, 1), Shape(4, 2, 5, 5, 1, 1)),
}


def entries(capability: tuple[int, int]) -> Iterator[Entry]:
    """All that a table should have for such a GPU, the most valuable first."""
    for element_bytes in ELEMENT_BYTES:
        if element_bytes == 1 and capability < ADA:
            continue
        for head_dim, kind in itertools.product(HEAD_DIMS, ("decode", "prefill")):
            yield Entry(kind, head_dim, element_bytes)


def dtypes(entry: Entry, capability: tuple[int, int]) -> tuple[torch.dtype, torch.dtype | None]:
    """The queries' type, and the cache's where it is another one."""
    if entry.element_bytes == 4:
        return torch.float32, None
    half = torch.bfloat16 if capability >= AMPERE else torch.float16
    return half, torch.float8_e4m3fn if entry.element_bytes == 1 else None


def tile_candidates(
    entry: Entry, present: AttentionTiles, capability: tuple[int, int], shared_limit: int
) -> list[AttentionTiles]:
    """`present`, then every configuration that arithmetic does not rule out; what remains is for the compiler to say."""
    # float32 products take no matrix instructions, and four times the memory: smaller tiles.
    narrow = entry.element_bytes < 4
    rows = (16,) if entry.kind == "decode" else (64, 128) if narrow else (32, 64)
    tiles = (32, 64, 128) if narrow else (16, 32, 64)
    warps = (2, 4, 8) if entry.kind == "decode" else (4, 8)
    # With s stages, s - 1 tiles are on their way while one is computed with.
    stages = (1,) if capability < AMPERE else (2, 3, 4) if narrow else (2, 3)
    every = (
        AttentionTiles(
            head_dim=entry.head_dim,
            element_bytes=entry.element_bytes,
            rows=row,
            tile=tile,
            num_warps=warp,
            num_stages=stage,
        )
        for row, tile, warp, stage in itertools.product(rows, tiles, warps, stages)
    )
    plausible = _decode_is_plausible if entry.kind == "decode" else _prefill_is_plausible
    return [present, *(one for one in every if one != present and plausible(one, shared_limit))]


def _bytes_on_the_way(tiles: AttentionTiles) -> int:
    return max(1, tiles.num_stages - 1) * 2 * tiles.tile * tiles.head_dim * tiles.element_bytes


def _decode_is_plausible(tiles: AttentionTiles, shared_limit: int) -> bool:
    """Eight keys a warp, if a matrix instruction takes as many; room for two programs on a multiprocessor."""
    has_work = tiles.element_bytes == 4 or 8 * tiles.num_warps <= tiles.tile
    return has_work and _bytes_on_the_way(tiles) <= shared_limit // 2


def _prefill_is_plausible(tiles: AttentionTiles, shared_limit: int) -> bool:
    """The running sums and the scores in registers; 16 rows a warp, unless wide heads give it columns enough."""
    numbers = tiles.rows * (tiles.head_dim + tiles.tile) // (32 * tiles.num_warps)
    fits = _bytes_on_the_way(tiles) + tiles.rows * tiles.head_dim * tiles.element_bytes <= shared_limit
    has_work = tiles.element_bytes == 4 or tiles.head_dim > 128 or tiles.rows >= 16 * tiles.num_warps
    return fits and numbers <= 192 and has_work


def rule_candidates(present: SegmentRule) -> list[SegmentRule]:
    """`present`, then others. Each cuts a row by its own length alone, so all are as independent of the batch as it is."""
    programs = [replace(present, programs=count) for count in (2048, 4096, 8192, 16384)]
    cuts = [
        replace(present, tokens=tokens, max_segments=most)
        for tokens, most in itertools.product((128, 256, 512), (16, 32, 64))
    ]
    return list(dict.fromkeys([present, *programs, *cuts]))
