"""Decode attention: bytes of keys and values a second, over the copy bandwidth of the same run; beside FlashInfer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.batches import AttentionBatch, make_batch
from benchmarks.gpu.context import Context
from pagoda_kernels import backend

# A launch reads this much at least, over several layers' caches, so that none of it is found in the cache of the GPU.
LEAST_BYTES = 1 << 30
MOST_BYTES = 48 << 30
GOAL = 0.90


def run(context: Context) -> dict[str, Any]:
    """Every batch size and context length; the headline is the median share of the bandwidth where there is work enough."""
    backend.use_backend("triton")
    for heads, kv_heads, length, size, kv_dtype in _configurations(context):
        if context.seconds_left() < 15:
            break
        _measure(context, heads, kv_heads, length, size, kv_dtype)
    headline: dict[str, Any] = {"goal": GOAL, "configurations": len(context.entries)}
    for kv_dtype in ("bfloat16", "float8_e4m3fn"):
        shares = sorted(
            entry["share_of_copy"]
            for entry in context.entries
            if entry["kv_dtype"] == kv_dtype and entry["bytes"] >= 256 << 20
        )
        headline[f"median_share_of_copy_{kv_dtype}"] = shares[len(shares) // 2] if shares else None
    beside = sorted(
        entry["over_flashinfer"] for entry in context.entries if isinstance(entry.get("over_flashinfer"), float)
    )
    headline["median_over_flashinfer"] = beside[len(beside) // 2] if beside else None
    return {"results": context.entries, "headline": headline}


def _configurations(context: Context) -> Iterator[tuple[int, int, int, int, torch.dtype | None]]:
    """Heads, KV heads, context length, batch size, float8 type: long work first, for it decides."""
    if context.dry_run:
        yield from ((4, 2, 40, 2, None), (4, 2, 40, 2, torch.float8_e4m3fn))
        return
    long, sizes = (8192, 2048), (64, 256, 16)
    for length, size in itertools.product(long, sizes):
        yield 32, 8, length, size, None
    for length, size in itertools.product(long, sizes[:2]):
        yield 32, 8, length, size, torch.float8_e4m3fn
    for length, size in itertools.product(long, sizes):
        yield 64, 8, length, size, None
    for heads, length, size in itertools.product((32, 64), (2048, 8192, 512, 32768), (64, 256, 16, 4, 1)):
        if length not in long or size not in sizes:
            yield heads, 8, length, size, None
    yield 32, 8, 32768, 16, torch.float8_e4m3fn
    yield 64, 8, 8192, 64, torch.float8_e4m3fn


def _measure(context: Context, heads: int, kv_heads: int, length: int, size: int, kv_dtype: torch.dtype | None) -> None:
    """Measure one configuration, if its caches are not too large."""
    head_dim = context.choose(128, 16)
    cache_dtype = kv_dtype or context.dtype
    layer_bytes = 2 * size * length * kv_heads * head_dim * cache_dtype.itemsize
    if layer_bytes > MOST_BYTES:
        return
    layers = context.choose(min(16, max(1, math.ceil(LEAST_BYTES / layer_bytes))), 1)
    batches = [
        make_batch(
            [(1, length)] * size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=context.dtype,
            device=context.device,
            kv_dtype=kv_dtype,
            seed=layer,
        )
        for layer in range(layers)
    ]
    entry: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "context": length, "batch": size, "layers": layers}
    entry |= {"kv_dtype": str(cache_dtype).removeprefix("torch."), **_rate(context, batches, AttentionBatch.attend)}
    if kv_dtype is None:
        entry |= _beside_flashinfer(context, batches, entry["microseconds"])
    context.keep(entry)


def _rate(
    context: Context, batches: list[AttentionBatch], attend: Callable[[AttentionBatch], object]
) -> dict[str, float]:
    seconds = context.seconds_of(lambda: [attend(batch) for batch in batches]) / len(batches)
    rate = batches[0].kv_bytes / seconds
    return {
        "bytes": batches[0].kv_bytes,
        "microseconds": 1e6 * seconds,
        "bytes_per_second": rate,
        "share_of_copy": rate / context.ceilings["copy_bytes_per_second"],
    }


def _beside_flashinfer(context: Context, batches: list[AttentionBatch], microseconds: float) -> dict[str, Any]:
    """FlashInfer's time for the same caches and its share of ours; nothing where it is not installed."""
    try:
        attend = _flashinfer(batches)
        if attend is None:
            return {}
        theirs = _rate(context, batches, attend)["microseconds"]
    except Exception as error:  # whatever a peer fails with, our own figure stands
        return {"over_flashinfer": f"not available: {type(error).__name__}: {str(error)[:120]}"}
    return {"flashinfer_microseconds": theirs, "over_flashinfer": theirs / microseconds}


def _flashinfer(batches: list[AttentionBatch]) -> Callable[[AttentionBatch], object] | None:
    """FlashInfer's paged decode on the same caches; None where it is not installed. All batches have the same lengths."""
    try:
        import flashinfer
    except ImportError:
        return None
    first = batches[0]
    _, num_kv_heads, block_size, head_dim = first.k_cache.shape
    lengths = first.metadata.seq_lens
    counts = (lengths + block_size - 1) // block_size
    wrappers = {}
    for batch in batches:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=batch.query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        columns = torch.arange(batch.metadata.block_table.shape[1], device=counts.device)
        wrapper.plan(
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
            batch.metadata.block_table[columns < counts.unsqueeze(1)],
            ((lengths - 1) % block_size + 1).int(),
            batch.query.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            q_data_type=batch.query.dtype,
            kv_data_type=batch.k_cache.dtype,
        )
        wrappers[id(batch)] = wrapper
    return lambda batch: wrappers[id(batch)].run(batch.query, (batch.k_cache, batch.v_cache))
