"""Prefill attention: FLOP/s over the rate of a bf16 matrix product in the same run, beside torch's SDPA on contiguous keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.batches import AttentionBatch, make_batch
from benchmarks.gpu.context import Context
from pagoda_kernels import backend

GOALS = {"flash": 1.0, "cudnn": 0.9}


def run(context: Context) -> dict[str, Any]:
    """Whole prompts and chunks over a prefix; the headline is of the longest prompt."""
    backend.use_backend("triton")
    rows = context.choose(
        [(8192, 8192), (4096, 4096), (2048, 2048), (1024, 1024), (512, 512), (2048, 16384), (512, 8192)],
        [(8, 8), (4, 12)],
    )
    shapes = context.choose([(32, 8, 128), (16, 8, 128), (32, 32, 64)], [(4, 2, 16)])
    for num_heads, num_kv_heads, head_dim in shapes:
        for query_len, seq_len in rows:
            if context.seconds_left() < 20:
                break
            batch = make_batch(
                [(query_len, seq_len)] * context.choose(max(1, 8192 // query_len), 2),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=context.dtype,
                device=context.device,
            )
            context.keep(_entry(context, batch))
    found = context.entries
    whole = [entry for entry in found if entry["query_len"] == entry["seq_len"] and entry["heads"] == shapes[0][0]]
    return {"results": found, "goals": GOALS, "headline": whole[0] if whole else None}


def _entry(context: Context, batch: AttentionBatch) -> dict[str, Any]:
    query_len, seq_len = batch.rows[0]
    num_heads, head_dim = batch.query.shape[1:]
    seen = query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2
    flops = 4 * num_heads * head_dim * seen * len(batch.rows)
    seconds = context.seconds_of(batch.attend)
    entry = {
        "heads": num_heads,
        "kv_heads": batch.k_cache.shape[1],
        "head_dim": head_dim,
        "rows": len(batch.rows),
        "query_len": query_len,
        "seq_len": seq_len,
        "microseconds": 1e6 * seconds,
        "tflops": flops / seconds / 1e12,
        "share_of_matmul": flops / seconds / context.ceilings["matmul_flops_per_second"],
    }
    if query_len == seq_len and not context.dry_run:  # SDPA's causal mask begins at the first key
        for name, choice in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            try:
                entry[f"over_{name}"] = context.seconds_of(_sdpa(batch, choice)) / seconds
            except RuntimeError as error:
                entry[f"over_{name}"] = f"not available: {str(error).splitlines()[0][:120]}"
    return entry


def _sdpa(batch: AttentionBatch, choice: SDPBackend) -> Callable[[], torch.Tensor]:
    """torch's attention over contiguous random tensors of the same sizes."""
    query_len = batch.rows[0][0]
    num_kv_heads, head_dim = batch.k_cache.shape[1], batch.k_cache.shape[3]
    query = batch.query.view(len(batch.rows), query_len, -1, head_dim).transpose(1, 2).contiguous()
    keys, values = (
        torch.randn(len(batch.rows), num_kv_heads, query_len, head_dim, device=query.device).to(query.dtype)
        for _ in range(2)
    )

    def attend() -> torch.Tensor:
        with sdpa_kernel(choice):
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    return attend
