"""Norm, activation, rotation with KV write, and sampling: bytes that must move a second, over the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.context import Context
from pagoda_kernels import backend


def run(context: Context) -> dict[str, Any]:
    """Each kernel at the sizes of an 8B model, for a decode batch and for a chunk of a prompt."""
    backend.use_backend("triton")
    for tokens in context.choose((256, 8192), (3,)):
        for name, moved, launch in _launches(context, tokens):
            seconds = context.seconds_of(launch)
            context.keep(
                {
                    "kernel": name,
                    "tokens": tokens,
                    "bytes": moved,
                    "microseconds": 1e6 * seconds,
                    "share_of_copy": moved / seconds / context.ceilings["copy_bytes_per_second"],
                }
            )
    return {
        "results": context.entries,
        "headline": {e["kernel"]: round(e["share_of_copy"], 3) for e in context.entries if e["tokens"] != 256},
    }


def _launches(context: Context, tokens: int) -> list[tuple[str, int, Callable[[], object]]]:
    """Name, bytes read and written, and the launch."""
    hidden, inner, vocabulary = context.choose((4096, 12288, 151_936), (64, 96, 300))
    heads, kv_heads, head_dim = context.choose((32, 8, 128), (4, 2, 16))
    device, dtype = context.device, context.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, residual, weight, gated = (
        random(tokens, hidden),
        random(tokens, hidden),
        random(hidden),
        random(tokens, 2 * inner),
    )
    qkv, head_norm = random(tokens, heads + 2 * kv_heads, head_dim), random(head_dim)
    angles = torch.randn(tokens, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    caches = [random(tokens // 16 + 2, kv_heads, 16, head_dim) for _ in range(2)]
    slots = torch.randperm(tokens, device=device) + 16
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    rows = min(256, tokens)
    logits = torch.randn(rows, vocabulary, device=device)
    best, index = logits.amax(-1), torch.arange(rows, device=device)
    ones = torch.ones(rows, device=device)

    def draw(top_p: float) -> Callable[[], object]:
        return lambda: kernels.sample_top_p_by_rejection(
            logits, best, index, index, index, ones, ones * 0, ones.double() * top_p
        )

    kernels = backend.active
    return [
        ("rms_norm", 4 * x.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6, residual)),
        ("silu_and_mul", gated.nbytes * 3 // 2, lambda: kernels.silu_and_mul(gated)),
        (
            "rotate_and_store",
            2 * qkv.nbytes + cos.nbytes + sin.nbytes,
            lambda: kernels.rotate_and_store(
                query, key, value, cos, sin, head_norm, head_norm, 1e-6, caches[0], caches[1], slots
            ),
        ),
        ("greedy_sample", logits.nbytes, lambda: kernels.greedy_sample(logits)),
        ("sample_top_p_by_rejection", logits.nbytes, draw(1.0)),
        ("sample_top_p_by_rejection top_p", logits.nbytes, draw(0.95)),
    ]
