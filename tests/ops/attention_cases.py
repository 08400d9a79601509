"""Random attention batches over a poisoned cache, and what a naive float64 computation makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


@dataclass(frozen=True)
class AttentionCase:
    """A batch; `keys[r]` and `values[r]` are row r's whole context [seq_len, num_kv_heads, head_dim], as in the cache."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    kv_scales: tuple[float, float] | None = None

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def run(self, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """On the active backend."""
        return backend.active.paged_attention(
            self.query,
            self.k_cache,
            self.v_cache,
            self.metadata,
            self.scale,
            sliding_window,
            soft_cap,
            self.kv_scales,
        )

    def expected(self, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """The same in float64, row by row, head by head."""
        output = torch.empty(self.query.shape, dtype=torch.float64)
        starts = self.metadata.query_start_loc.tolist()
        group = self.query.shape[1] // self.k_cache.shape[1]
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            query = self.query[starts[row] : starts[row + 1]].double()
            distance = (len(keys) - len(query) + torch.arange(len(query)))[:, None] - torch.arange(len(keys))
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            for head in range(self.query.shape[1]):
                scores = query[:, head] @ keys[:, head // group].double().T * self.scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
                output[starts[row] : starts[row + 1], head] = weights @ values[:, head // group].double()
        return output

    def assert_matches(
        self, sliding_window: int | None = None, soft_cap: float | None = None, tolerance: float = 5e-6
    ) -> None:
        """`run` gives `expected`, within `tolerance`."""
        actual = self.run(sliding_window, soft_cap)
        assert actual.dtype == self.query.dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(
            actual.double(), self.expected(sliding_window, soft_cap), rtol=tolerance, atol=tolerance
        )


def make_case(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
    num_decode_rows: int | None = None,
    num_short_rows: int = 0,
    seed: int = 0,
) -> AttentionCase:
    """A batch of `(query_len, seq_len)` rows, in blocks of random order.

    Every slot that holds no token of a row is filled with `poison`, in unused blocks, the null block and the ends of last
    blocks. By default all leading rows with one query token are decode rows.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = sum(counts) + 4
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.full(shape, poison, dtype=dtype), torch.full(shape, poison, dtype=dtype)
    block_table = torch.zeros((len(rows), max(counts) + 3), dtype=torch.int32)
    keys, values, slots = [], [], []
    for row, (query_len, seq_len) in enumerate(rows):
        blocks = torch.tensor([order.pop() for _ in range(counts[row])])
        block_table[row, : counts[row]] = blocks
        keys.append(torch.randn((seq_len, num_kv_heads, head_dim), generator=generator).to(dtype))
        values.append(torch.randn((seq_len, num_kv_heads, head_dim), generator=generator).to(dtype))
        for position in range(seq_len):
            block, offset = int(blocks[position // block_size]), position % block_size
            k_cache[block, :, offset] = keys[row][position]
            v_cache[block, :, offset] = values[row][position]
            if position >= seq_len - query_len:
                slots.append(block * block_size + offset)
    query_lens = [query_len for query_len, _ in rows]
    if num_decode_rows is None:
        num_decode_rows = next((i for i, query_len in enumerate(query_lens) if query_len != 1), len(rows))
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int(),
        seq_lens=torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32),
        block_table=block_table,
        slot_mapping=torch.tensor(slots),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_len for _, seq_len in rows),
        num_decode_rows=num_decode_rows,
        num_short_rows=num_short_rows,
    )
    query = torch.randn((sum(query_lens), num_heads, head_dim), generator=generator).to(dtype) * 2
    return AttentionCase(query, k_cache, v_cache, metadata, keys, values)
