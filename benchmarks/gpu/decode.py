"""Decode attention: bytes of keys and values a second, over the copy bandwidth of the same run; beside FlashInfer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    shapes = context.choose([(32, 8), (64, 8)], [(4, 2)])
    lengths = context.choose((2048, 8192, 512, 32768), (40,))
    sizes = context.choose((64, 256, 16, 4, 1), (2,))
    found: list[dict[str, Any]] = []
    for (num_heads, num_kv_heads), length, size in itertools.product(shapes, lengths, sizes):
        head_dim = context.choose(128, 16)
        layer_bytes = 2 * size * length * num_kv_heads * head_dim * 2
        if layer_bytes > MOST_BYTES or context.seconds_left() < 30:
            continue
        layers = context.choose(min(16, max(1, math.ceil(LEAST_BYTES / layer_bytes))), 1)
        batches = [
            make_batch(
                [(1, length)] * size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=context.dtype,
                device=context.device,
                seed=layer,
            )
            for layer in range(layers)
        ]
        entry = {"heads": num_heads, "kv_heads": num_kv_heads, "context": length, "batch": size, "layers": layers}
        entry |= _rate(context, batches, lambda batch: _attend(batch))
        peer = _flashinfer(batches)
        if peer is not None:
            other = _rate(context, batches, peer)
            entry["flashinfer_microseconds"] = other["microseconds"]
            entry["over_flashinfer"] = other["microseconds"] / entry["microseconds"]
        found.append(entry)
        print(f"  {entry}", flush=True)
        del batches
    large = sorted(entry["share_of_copy"] for entry in found if entry["bytes"] >= context.choose(256 << 20, 0))
    headline = {
        "median_share_of_copy": large[len(large) // 2] if large else None,
        "goal": GOAL,
        "configurations": len(found),
    }
    return {"results": found, "headline": headline}


def _attend(batch: AttentionBatch) -> torch.Tensor:
    return backend.active.paged_attention(
        batch.query, batch.k_cache, batch.v_cache, batch.metadata, batch.scale, None, None
    )


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
