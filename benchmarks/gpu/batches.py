"""Random attention batches on the device, and what a float64 computation makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Rows `(query_len, seq_len)` over caches `[blocks, KV heads, block size, head_dim]`; decode rows first."""

    rows: list[tuple[int, int]]
    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata
    kv_scales: tuple[float, float] | None = None

    def attend(self, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """The kernel's result."""
        caches = self.k_cache, self.v_cache
        return backend.active.paged_attention(
            self.query, *caches, self.metadata, self.scale, sliding_window, soft_cap, self.kv_scales
        )

    def row(self, row: int) -> AttentionBatch:
        """Row `row`, which decodes, alone."""
        metadata = AttentionMetadata(
            query_start_loc=self.metadata.query_start_loc[:2],
            seq_lens=self.metadata.seq_lens[row : row + 1],
            block_table=self.metadata.block_table[row : row + 1],
            slot_mapping=self.metadata.slot_mapping[row : row + 1],
            max_query_len=1,
            max_seq_len=self.rows[row][1],
            num_decode_rows=1,
        )
        query = self.query[row : row + 1]
        return replace(self, rows=self.rows[row : row + 1], query=query, metadata=metadata)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.query.shape[-1] ** -0.5)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that the rows hold."""
        per_token = 2 * self.k_cache.shape[1] * self.k_cache.shape[3] * self.k_cache.element_size()
        return sum(seq_len for _, seq_len in self.rows) * per_token

    def expected(self, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """The result in float64, row by row."""
        _, num_kv_heads, _, head_dim = self.k_cache.shape
        group = self.query.shape[1] // num_kv_heads
        output = torch.empty(self.query.shape, dtype=torch.float64, device=self.query.device)
        first = 0
        k_scale, v_scale = self.kv_scales or (1.0, 1.0)
        for row, (query_len, seq_len) in enumerate(self.rows):
            keys = self._context(self.k_cache, row, seq_len) * k_scale
            values = self._context(self.v_cache, row, seq_len) * v_scale
            query = self.query[first : first + query_len].double().view(query_len, num_kv_heads, group, head_dim)
            scores = torch.einsum("qhgd,hkd->hgqk", query, keys) * self.scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            positions = torch.arange(seq_len, device=query.device)
            distance = positions[-query_len:, None] - positions
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            output[first : first + query_len] = torch.einsum("hgqk,hkd->qhgd", weights, values).flatten(1, 2)
            first += query_len
        return output

    def _context(self, cache: torch.Tensor, row: int, seq_len: int) -> torch.Tensor:
        blocks = self.metadata.block_table[row, : -(-seq_len // cache.shape[2])].long()
        # float8 is gathered as bytes, which every operation knows how to move.
        gathered = cache.view(torch.uint8)[blocks].view(cache.dtype) if cache.element_size() == 1 else cache[blocks]
        return gathered.double().transpose(0, 1).flatten(1, 2)[:, :seq_len]


def make_batch(
    rows: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 16,
    kv_dtype: torch.dtype | None = None,
    poisoned: bool = False,
    seed: int = 0,
) -> AttentionBatch:
    """Blocks in random order; `poisoned`: every slot that holds no token of a row is NaN. `kv_dtype`: a float8 cache's."""
    generator = torch.Generator(device).manual_seed(seed)
    counts = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks - 1, device=device, generator=generator) + 1
    block_table = torch.zeros((len(rows), max(counts)), dtype=torch.int32, device=device)
    begin = 0
    for row, count in enumerate(counts):
        block_table[row, :count] = order[begin : begin + count].int()
        begin += count
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = [torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2)]
    if poisoned:
        unused = torch.cat((torch.zeros(1, dtype=torch.int64, device=device), order[begin:]))
        for cache in caches:
            cache[unused] = math.nan
            for row, (_, seq_len) in enumerate(rows):
                if seq_len % block_size:
                    cache[block_table[row, counts[row] - 1].long(), :, seq_len % block_size :] = math.nan
    query_lens = torch.tensor([0, *(query_len for query_len, _ in rows)])
    num_tokens = int(query_lens.sum())
    metadata = AttentionMetadata(
        query_start_loc=query_lens.cumsum(0).int().to(device),
        seq_lens=torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32, device=device),
        block_table=block_table,
        slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        max_query_len=int(query_lens.max()),
        max_seq_len=max(seq_len for _, seq_len in rows),
        num_decode_rows=next((i for i, (query_len, _) in enumerate(rows) if query_len > 1), len(rows)),
    )
    if kv_dtype is not None:
        caches = [cache.to(kv_dtype) for cache in caches]
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=dtype, device=device).normal_(generator=generator)
    kv_scales = None if kv_dtype is None else (0.5, 0.25)
    return AttentionBatch(rows, query, caches[0], caches[1], metadata, kv_scales)


def batch_on_meta(
    row: tuple[int, int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    block_size: int = 16,
) -> AttentionBatch:
    """One row `(query_len, seq_len)` without any numbers in it, to see what its launch wants compiled."""
    query_len, seq_len = row

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    caches = [empty(2, num_kv_heads, block_size, head_dim, dtype=kv_dtype or dtype) for _ in range(2)]
    metadata = AttentionMetadata(
        query_start_loc=empty(2),
        seq_lens=empty(1),
        block_table=empty(1, -(-seq_len // block_size)),
        slot_mapping=empty(query_len, dtype=torch.int64),
        max_query_len=query_len,
        max_seq_len=seq_len,
        num_decode_rows=int(query_len == 1),
    )
    return AttentionBatch([row], empty(query_len, num_heads, head_dim, dtype=dtype), caches[0], caches[1], metadata)
