"""Every kernel against a float64 computation on random data. Memory that outputs are taken from is full of NaN before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.batches import make_batch
from benchmarks.gpu.context import Context
from pagoda_kernels import backend

# Of ‖actual - expected‖ / ‖expected‖.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float8_e4m3fn: 1.5e-2}

Check = tuple[str, torch.dtype, Callable[[], tuple[torch.Tensor, torch.Tensor]]]


def run(context: Context) -> dict[str, Any]:
    """All checks; `passed` if every error is within its bound."""
    backend.use_backend("triton")
    found = []
    for name, dtype, check in itertools.chain(_attention(context), _elementwise(context), _sampling(context)):
        _poison(context)
        actual, expected = check()
        error = ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        good = error <= TOLERANCE[dtype]  # NaN is not
        found.append(
            {"check": name, "dtype": str(dtype), "relative_error": error, "bound": TOLERANCE[dtype], "good": good}
        )
        if not good:
            print(f"  WRONG: {name} {dtype}: {error:.3g}", flush=True)
    bad = [entry["check"] for entry in found if not entry["good"]]
    return {"checks": found, "passed": not bad, "headline": {"checks": len(found), "wrong": bad}}


def _poison(context: Context) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for size in context.choose((1 << 10, 1 << 16, 1 << 20, 1 << 25), (1 << 10,)):
        torch.full((size,), torch.nan, device=context.device)


# Heads, KV heads, head dimension, type, sliding window, soft cap, block size. Every line compiles kernels of its own, which
# takes seconds: so each thing that can go wrong is in few lines, the commonest shapes first.
ATTENTION = (
    (32, 8, 128, torch.bfloat16, None, None, 16),
    (64, 8, 128, torch.bfloat16, None, None, 16),
    (32, 8, 128, torch.float32, None, None, 16),
    (32, 8, 128, torch.bfloat16, 100, None, 16),
    (40, 8, 128, torch.bfloat16, None, None, 256),
    (24, 8, 64, torch.float16, None, None, 16),
    (24, 8, 64, torch.bfloat16, None, 20.0, 32),
    (7, 1, 80, torch.bfloat16, None, None, 16),
    (16, 16, 96, torch.float16, 100, None, 16),
    (8, 2, 256, torch.bfloat16, None, None, 16),
    (8, 2, 256, torch.float32, 100, 20.0, 16),
)
TINY_ATTENTION = ((6, 2, 16, torch.float32, None, None, 16), (6, 2, 16, torch.float32, 10, 20.0, 16))


def _attention(context: Context) -> Iterator[Check]:
    decode = [(1, length) for length in context.choose((1, 15, 16, 17, 255, 256, 257, 2064, 9000), (1, 17, 40))]
    chunks = context.choose([(3, 3), (64, 64), (130, 1000), (1, 77), (700, 700)], [(3, 3), (5, 30)])
    for num_heads, num_kv_heads, head_dim, dtype, window, soft_cap, block_size in context.choose(
        ATTENTION, TINY_ATTENTION
    ):
        batch = make_batch(
            decode + chunks,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=context.device,
            block_size=block_size,
            poisoned=True,
        )

        def check(batch=batch, window=window, soft_cap=soft_cap) -> tuple[torch.Tensor, torch.Tensor]:
            actual = backend.active.paged_attention(
                batch.query, batch.k_cache, batch.v_cache, batch.metadata, batch.scale, window, soft_cap
            )
            return actual, batch.expected(window, soft_cap)

        name = f"attention {num_heads}/{num_kv_heads}x{head_dim} window={window} cap={soft_cap} block={block_size}"
        yield name, dtype, check


def _elementwise(context: Context) -> Iterator[Check]:
    tokens, size = context.choose((257, 4096), (3, 40))
    for dtype in context.choose((torch.bfloat16, torch.float16, torch.float32), (torch.float32,)):
        x, residual = (torch.randn(tokens, size, device=context.device).to(dtype) for _ in range(2))
        weight = torch.randn(size, device=context.device).to(dtype)

        def norm(x=x, residual=residual, weight=weight) -> tuple[torch.Tensor, torch.Tensor]:
            normed, stream = backend.active.rms_norm(x, weight, 1e-6, residual)
            wide = (x + residual).double()
            expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            return torch.cat((normed, stream)), torch.cat((expected, wide))

        def silu(x=x) -> tuple[torch.Tensor, torch.Tensor]:
            gate, up = x.double().chunk(2, -1)
            return backend.active.silu_and_mul(x), F.silu(gate) * up

        def gelu(x=x) -> tuple[torch.Tensor, torch.Tensor]:
            gate, up = x.double().chunk(2, -1)
            return backend.active.gelu_and_mul(x), F.gelu(gate, approximate="tanh") * up

        yield f"rms_norm {tokens}x{size}", dtype, norm
        yield f"silu_and_mul {tokens}x{size}", dtype, silu
        yield f"gelu_and_mul {tokens}x{size}", dtype, gelu
        for head_dim, has_norm in itertools.product(context.choose((64, 80, 128, 256), (16,)), (False, True)):
            yield (
                f"rotate_and_store head_dim={head_dim} norm={has_norm}",
                dtype,
                _rotation(context, dtype, head_dim, has_norm),
            )


def _rotation(
    context: Context, dtype: torch.dtype, head_dim: int, has_norm: bool
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    tokens, heads, kv_heads = context.choose((70, 14, 2), (3, 3, 1))
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=context.device).to(dtype)
    norms = (
        [torch.rand(head_dim, device=context.device).to(dtype) + 0.5 for _ in range(2)] if has_norm else [None, None]
    )
    angles = torch.randn(tokens, head_dim // 2, device=context.device)
    slots = torch.randperm(5 * 16, device=context.device)[:tokens] + 16

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        caches = [torch.zeros(6, kv_heads, 16, head_dim, dtype=dtype, device=context.device) for _ in range(2)]
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        actual = backend.active.rotate_and_store(
            query, key, value, angles.cos(), angles.sin(), *norms, 1e-6, *caches, slots
        )
        stored = [cache.transpose(1, 2).reshape(-1, kv_heads, head_dim)[slots] for cache in caches]
        turned = [_turned(part, norm, angles) for part, norm in zip((query, key), norms, strict=True)]
        return torch.cat((actual, *stored), dim=1), torch.cat((*turned, value.double()), dim=1)

    return check


def _turned(heads: torch.Tensor, norm: torch.Tensor | None, angles: torch.Tensor) -> torch.Tensor:
    wide = heads.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    first, second = wide.chunk(2, -1)
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _sampling(context: Context) -> Iterator[Check]:
    """Greedy ids exactly; draws over many positions against the distribution they must follow."""
    from pagoda_kernels.sampling import choose_greedy, choose_open

    vocabulary, rows = context.choose((151_936, 64), (300, 2))
    logits = torch.randn(rows, vocabulary, device=context.device)

    def greedy() -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, best = choose_greedy(logits)
        expected = torch.cat((logits.argmax(-1).double(), logits.amax(-1).double()))
        return torch.cat((token_ids.double(), best.double())), expected

    def nucleus() -> tuple[torch.Tensor, torch.Tensor]:
        """How often each of five tokens comes, of which top-p leaves four."""
        draws = context.choose(20_000, 4)
        probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], device=context.device)
        row = torch.full((1, vocabulary), -torch.inf, device=context.device)
        row[0, :5] = probabilities.log()
        ones = torch.ones(draws, device=context.device)
        ids = choose_open(
            row,
            row.amax(-1),
            torch.zeros(draws, dtype=torch.int64, device=context.device),
            torch.full((draws,), 7, dtype=torch.int64, device=context.device),
            torch.arange(draws, device=context.device),
            ones,
            ones * 0,
            ones.double() * 0.94,
        )
        counts = torch.bincount(ids, minlength=5)[:5].double() / draws
        expected = probabilities.double() * (torch.arange(5, device=context.device) < 4)
        close = (counts - expected / expected.sum()).abs().max() < context.choose(0.015, 1.0)
        return torch.ones(1) if close else torch.zeros(1), torch.ones(1).double()

    yield f"choose_greedy {rows}x{vocabulary}", torch.float32, greedy
    yield "choose_open top_p=0.94", torch.float32, nucleus
