"""Which tile sizes, warps and pipeline stages a kernel is launched with: checked-in tables, one a kind of GPU.

Nothing is searched at run time: a search would make starts slow and results differ from process to process. A table is
measured by `python -m benchmarks.gpu --parts tune`; as `tuned/sm_XY.json` it is taken on every GPU of compute capability X.Y.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

TABLES = Path(__file__).resolve().parent.parent / "tuned"

# For a compute capability without a table of its own, another one's, of as much shared memory or less: 8.6 and 12.0 have
# 100 KiB a multiprocessor, as 8.9 has.
_STANDS_IN = {
    (8, 6): "sm_89",
    (8, 7): "sm_80",
    (10, 0): "sm_90",
    (10, 3): "sm_90",
    (12, 0): "sm_89",
}
DEFAULT_TABLE = "default"
# The lists of `AttentionTiles` in a table.
_TILES = ("decode_attention", "prefill_attention", "latent_decode_attention", "latent_prefill_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """A configuration of the attention kernel for heads of up to `head_dim` numbers of up to `element_bytes` each.

    What has how many bytes, the function `element_bytes` says. `rows` of queries (a power of two, at least 16 and at least
    the query heads of a KV head) against `tile` keys at a time.
    """

    head_dim: int
    element_bytes: int
    rows: int
    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRule:
    """How a decode row's context is cut: a part for every `tokens`, at most `max_segments` (a power of two).

    `programs`: how many are wanted in a launch. Where rows and heads alone give as many, one program takes several parts of
    its row: programs without a part, of rows that are shorter than others may be, cost more than finer shares would gain.
    """

    tokens: int
    max_segments: int
    programs: int

    def most_segments(self, num_keys: int) -> int:
        """Parts of a row of up to `num_keys` visible keys."""
        return min(max(1, -(-num_keys // self.tokens)), self.max_segments)

    def programs_per_row(self, num_rows: int, num_segments: int) -> int:
        """How many programs share the up to `num_segments` parts of each of `num_rows` rows of a KV head or group of heads."""
        return min(num_segments, max(1, self.programs // num_rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningTable:
    """One GPU kind's choices; `note` says how they were found."""

    name: str
    note: str
    segments: SegmentRule
    decode_attention: tuple[AttentionTiles, ...]
    prefill_attention: tuple[AttentionTiles, ...]
    latent_decode_attention: tuple[AttentionTiles, ...]
    latent_prefill_attention: tuple[AttentionTiles, ...]

    def decode_tiles(self, head_dim: int, element_bytes: int) -> AttentionTiles:
        """The decode configuration for such heads. Raises `ValueError` for heads larger than any in the table."""
        return _smallest_fit(self, self.decode_attention, head_dim, element_bytes)

    def prefill_tiles(self, head_dim: int, element_bytes: int) -> AttentionTiles:
        """The prefill configuration, likewise."""
        return _smallest_fit(self, self.prefill_attention, head_dim, element_bytes)

    def latent_decode_tiles(self, latent_dim: int, element_bytes: int) -> AttentionTiles:
        """The decode configuration of attention over latent vectors of so many numbers."""
        return _smallest_fit(self, self.latent_decode_attention, latent_dim, element_bytes)

    def latent_prefill_tiles(self, latent_dim: int, element_bytes: int) -> AttentionTiles:
        """The prefill configuration, likewise."""
        return _smallest_fit(self, self.latent_prefill_attention, latent_dim, element_bytes)


def element_bytes(query_dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """The bytes by which tiles are chosen: a number's in the cache, or 4 where float32 queries widen whatever is there."""
    return 4 if query_dtype == torch.float32 else cache_dtype.itemsize


def own_table_name(capability: tuple[int, int]) -> str:
    """What a table for GPUs of compute capability `(major, minor)` is called, and its file is, whether or not there is one."""
    major, minor = capability
    return f"sm_{major}{minor}"


def table_name(capability: tuple[int, int]) -> str:
    """The table for such GPUs: their own where there is one, else one that suits; `default` runs anywhere."""
    own = own_table_name(capability)
    return own if (TABLES / f"{own}.json").exists() else _STANDS_IN.get(capability, DEFAULT_TABLE)


_in_use: ContextVar[TuningTable | None] = ContextVar("table_in_use", default=None)


@contextmanager
def table_in_use(table: TuningTable) -> Iterator[None]:
    """Kernels that this thread launches in the context use `table`, on any device."""
    token = _in_use.set(table)
    try:
        yield
    finally:
        _in_use.reset(token)


def table_of_device(device: torch.device) -> TuningTable:
    """The table for `device`; the default one for anything but an NVIDIA GPU, where only the interpreter runs kernels."""
    in_use = _in_use.get()
    if in_use is not None:
        return in_use
    if device.type != "cuda":
        return load_table(DEFAULT_TABLE)
    return _table_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _table_of_gpu(index: int) -> TuningTable:
    return load_table(table_name(torch.cuda.get_device_capability(index)))


@cache
def load_table(name: str) -> TuningTable:
    """Read `tuned/<name>.json`. Raises `ValueError` naming the file and what is wrong in it."""
    path = TABLES / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return TuningTable(
            name=name,
            note=content["note"],
            segments=_read(SegmentRule, content["segments"]),
            **{name: _read_all(AttentionTiles, content[name]) for name in _TILES},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def written(table: TuningTable) -> str:
    """`table` as its file has it: an entry a line."""
    lists = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in entries) + "\n  ]"
        for name, entries in ((name, getattr(table, name)) for name in _TILES)
    ]
    first = [f'  "note": {json.dumps(table.note)}', f'  "segments": {json.dumps(asdict(table.segments))}']
    return "{\n" + ",\n".join(first + lists) + "\n}\n"


Entry = TypeVar("Entry")


def _read(kind: type[Entry], values: Mapping[str, Any]) -> Entry:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if set(values) != known:
        raise ValueError(f"{kind.__name__} has {', '.join(sorted(known))}, not {', '.join(sorted(values))}")
    return kind(**values)


def _read_all(kind: type[Entry], entries: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    return tuple(_read(kind, entry) for entry in entries)


def _smallest_fit(
    table: TuningTable, entries: Sequence[AttentionTiles], head_dim: int, element_bytes: int
) -> AttentionTiles:
    fitting = [entry for entry in entries if entry.head_dim >= head_dim and entry.element_bytes >= element_bytes]
    if not fitting:
        raise ValueError(f"no attention configuration of {table.name} has heads of {head_dim} x {element_bytes} bytes")
    return min(fitting, key=lambda entry: (entry.head_dim, entry.element_bytes))
