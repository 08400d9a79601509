"""Every kernel against a float64 computation on random data, three times: a race shows as bits that differ.

Memory that outputs are taken from is full of NaN before.

Nearly all of the time goes into compiling, so the checks are dealt out to processes:

    python -m benchmarks.gpu.kernels SHARE OF OUT     prints the results of every OF-th check from SHARE on, a JSON object each
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.batches import make_batch
from benchmarks.gpu.context import Context
from pagoda_kernels import backend
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference import BACKEND as REFERENCE
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights, ExpertWeights, StepTensors

# Of ‖actual - expected‖ / ‖expected‖. float8: of numbers rounded to it, half a step at most and a fourth on the average.
TOLERANCE = {
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
    torch.float8_e4m3fn: 4e-2,
    torch.float8_e5m2: 8e-2,
}
MOST_PROCESSES = 8
TIMES = 3

Check = tuple[str, torch.dtype, Callable[[], tuple[torch.Tensor, torch.Tensor]]]


def run(context: Context) -> dict[str, Any]:
    """All checks; `passed` if every error is within its bound, and every process came to its end."""
    count = context.choose(max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)), 1)
    dry_run = ["--dry-run"] * context.dry_run
    children = [
        context.python("-m", "benchmarks.gpu.kernels", str(share), str(count), str(context.out), *dry_run)
        for share in range(count)
    ]
    failed = []
    for share, child in enumerate(children):
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):  # Triton prints a whole program when ptxas fails
                print(line, end="", flush=True)
                continue
            entry = json.loads(line)
            context.note(entry)
            if not entry["good"]:
                print(f"  WRONG: {entry}", flush=True)
        if child.wait():
            failed.append(f"process {share} ended with status {child.returncode}")
    bad = failed + [entry["check"] for entry in context.entries if not entry["good"]]
    return {
        "results": context.entries,
        "passed": not bad,
        "headline": {"checks": len(context.entries), "wrong": bad},
    }


def _results(context: Context, share: int, count: int) -> Iterator[dict[str, Any]]:
    """Results of every `count`-th check from `share` on. What a check raises is its result."""
    backend.use_backend("triton")
    torch.manual_seed(0)
    checks = itertools.chain(
        _attention(context),
        _latent(context),
        _elementwise(context),
        _head(context),
        _sampling(context),
        _invariance(context),
        _far_blocks(context),
        _gather(context),
        _experts(context),
        _delta_net(context),
    )
    for name, dtype, check in itertools.islice(checks, share, None, count):
        entry: dict[str, Any] = {"check": name, "dtype": str(dtype), "bound": TOLERANCE[dtype]}
        try:
            results = []
            for _ in range(TIMES):
                _poison(context)
                results.append(check())
            actual, expected = results[0]
            error = ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            same = all(torch.equal(actual, again) for again, _ in results[1:])
        except Exception as problem:  # such as a kernel that does not compile: the others are checked all the same
            yield {**entry, "error": f"{type(problem).__name__}: {str(problem)[:500]}", "good": False}
        else:
            good = same and error <= TOLERANCE[dtype]  # NaN is not
            yield {**entry, "relative_error": error, "same_bits_each_time": same, "good": good}


def _poison(context: Context) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for size in context.choose((1 << 10, 1 << 16, 1 << 20, 1 << 25), (1 << 10,)):
        torch.full((size,), torch.nan, device=context.device)


# Heads, KV heads, head dimension, type, sliding window, soft cap, block size, float8 type of the cache. Every line compiles
# kernels of its own, which takes seconds: so each thing that can go wrong is in few lines, the commonest shapes first.
ATTENTION: tuple[tuple[Any, ...], ...] = (
    (32, 8, 128, torch.bfloat16, None, None, 16),
    (32, 8, 128, torch.bfloat16, None, None, 16, torch.float8_e4m3fn),
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
    (24, 8, 64, torch.float16, 100, None, 16, torch.float8_e5m2),
    (8, 2, 256, torch.bfloat16, None, 20.0, 16, torch.float8_e4m3fn),
    (32, 8, 128, torch.float32, None, None, 16, torch.float8_e4m3fn),
)
TINY_ATTENTION = (
    (6, 2, 16, torch.float32, None, None, 16),
    (6, 2, 16, torch.float32, 10, 20.0, 16),
    (6, 2, 16, torch.float16, None, None, 16, torch.float8_e4m3fn),
)


def _attention(context: Context) -> Iterator[Check]:
    decode = [(1, length) for length in context.choose((1, 15, 16, 17, 255, 256, 257, 2064, 9000), (1, 17, 40))]
    chunks = context.choose([(3, 3), (64, 64), (130, 1000), (1, 77), (700, 700)], [(3, 3), (5, 30)])
    for num_heads, num_kv_heads, head_dim, dtype, window, soft_cap, block_size, *kv_dtypes in context.choose(
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
            kv_dtype=kv_dtypes[0] if kv_dtypes else None,
            poisoned=True,
        )

        def check(batch=batch, window=window, soft_cap=soft_cap) -> tuple[torch.Tensor, torch.Tensor]:
            return batch.attend(window, soft_cap), batch.expected(window, soft_cap)

        name = f"attention {num_heads}/{num_kv_heads}x{head_dim} window={window} cap={soft_cap} block={block_size}"
        yield " ".join([name, *(f"kv={kv_dtype}" for kv_dtype in kv_dtypes)]), dtype, check


def _latent(context: Context) -> Iterator[Check]:
    """DeepSeek's latents, with the heads of one of eight ranks and of a whole model; the values are the first of each."""
    rows = context.choose([(1, 1), (1, 257), (1, 9000), (3, 3), (130, 1000), (1, 77)], [(1, 1), (1, 40), (5, 30)])
    rank, rope_dim = context.choose((512, 64), (32, 8))
    for num_heads, dtype in context.choose(
        ((16, torch.bfloat16), (128, torch.bfloat16), (16, torch.float32)), ((4, torch.float32),)
    ):
        batch = make_batch(
            rows,
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=rank + rope_dim,
            dtype=dtype,
            device=context.device,
            block_size=16,
            poisoned=True,
        )

        def check(batch=batch) -> tuple[torch.Tensor, torch.Tensor]:
            cache = batch.k_cache
            attended = backend.active.latent_attention(batch.query, cache, batch.metadata, batch.scale, rank)
            return attended, replace(batch, v_cache=cache).expected()[..., :rank]

        yield f"latent_attention {num_heads}x{rank}+{rope_dim}", dtype, check


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
    for kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        check = _rotation(context, context.dtype, context.choose(128, 16), True, kv_dtype)
        yield f"rotate_and_store kv={kv_dtype}", kv_dtype, check


def _rotation(
    context: Context, dtype: torch.dtype, head_dim: int, has_norm: bool, kv_dtype: torch.dtype | None = None
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    tokens, heads, kv_heads = context.choose((70, 14, 2), (3, 3, 1))
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=context.device).to(dtype)
    norms = (
        [torch.rand(head_dim, device=context.device).to(dtype) + 0.5 for _ in range(2)] if has_norm else [None, None]
    )
    angles = torch.randn(tokens, head_dim // 2, device=context.device)
    slots = torch.randperm(5 * 16, device=context.device)[:tokens] + 16

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        shape, scales = (6, kv_heads, 16, head_dim), (0.25, 0.5) if kv_dtype is not None else None
        caches = [torch.zeros(shape, dtype=kv_dtype or dtype, device=context.device) for _ in range(2)]
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        actual = backend.active.rotate_and_store(
            query, key, value, angles.cos(), angles.sin(), *norms, 1e-6, *caches, slots, scales
        )
        stored = [
            cache.to(dtype).transpose(1, 2).reshape(-1, kv_heads, head_dim)[slots] * scale
            for cache, scale in zip(caches, scales or (1.0, 1.0), strict=True)
        ]
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


def _head(context: Context) -> Iterator[Check]:
    """Logits of half-precision models, which no rounding to half precision may touch."""
    from pagoda.models.layers.linear import unquantized_method

    rows, vocabulary, hidden = context.choose((64, 151_936, 1024), (3, 300, 64))
    for dtype in (torch.bfloat16, torch.float16):
        method = unquantized_method(dtype, torch.float32, torch.device(context.device))
        x, weight = (torch.randn(size, hidden, device=context.device).to(dtype) for size in (rows, vocabulary))

        def product(method=method, x=x, weight=weight) -> tuple[torch.Tensor, torch.Tensor]:
            """Rounded to float16 it would be off by 2e-4; how a tensor core adds up costs a tenth of that at most."""
            expected = x.double() @ weight.double().T
            close = (method.multiply(x, weight).double() - expected).norm() < 2e-5 * expected.norm()
            return torch.ones(1) if close else torch.zeros(1), torch.ones(1).double()

        yield f"head {rows}x{vocabulary}x{hidden} {dtype}", torch.float32, product


def _sampling(context: Context) -> Iterator[Check]:
    """Greedy ids exactly; draws over many positions against the distribution they must follow."""
    vocabulary, rows = context.choose((151_936, 64), (300, 2))
    logits = torch.randn(rows, vocabulary, device=context.device)

    def greedy() -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, best = backend.active.greedy_sample(logits)
        expected = torch.cat((logits.argmax(-1).double(), logits.amax(-1).double()))
        return torch.cat((token_ids.double(), best.double())), expected

    def nucleus() -> tuple[torch.Tensor, torch.Tensor]:
        """How often each of five tokens comes, of which top-p leaves four."""
        draws = context.choose(20_000, 4)
        probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], device=context.device)
        row = torch.full((1, vocabulary), -torch.inf, device=context.device)
        row[0, :5] = probabilities.log()
        ones = torch.ones(draws, device=context.device)
        ids = backend.active.sample_top_p_by_rejection(
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

    yield f"greedy_sample {rows}x{vocabulary}", torch.float32, greedy
    yield "sample_top_p_by_rejection top_p=0.94", torch.float32, nucleus


def _experts(context: Context) -> Iterator[Check]:
    """Grouped experts, some of which no token chooses, and a token alone."""
    num_experts, top_k, hidden_size, size, tokens = context.choose((32, 4, 1024, 416, 300), (4, 2, 24, 20, 5))
    for dtype in context.choose((torch.bfloat16, torch.float16, torch.float32), (torch.float32,)):

        def random(*shape: int, dtype=dtype) -> torch.Tensor:
            return (torch.randn(shape, device=context.device) * shape[-1] ** -0.5).to(dtype)

        experts = ExpertWeights(
            gate_up=random(num_experts, 2 * size, hidden_size),
            down=random(num_experts, hidden_size, size),
            gate_up_bias=random(num_experts, 2 * size),
            down_bias=random(num_experts, hidden_size),
            activation=0,
        )
        x = torch.randn(tokens, hidden_size, device=context.device).to(dtype)
        logits = torch.randn(tokens, num_experts, device=context.device) + torch.arange(
            num_experts, device=context.device
        )
        weights, ids = (each.contiguous() for each in logits.softmax(-1).topk(top_k))

        def grouped(x=x, weights=weights, ids=ids, experts=experts) -> tuple[torch.Tensor, torch.Tensor]:
            together = backend.active.grouped_experts(x, weights, ids, experts)
            alone = backend.active.grouped_experts(x[:1], weights[:1], ids[:1], experts)
            assert torch.equal(alone, together[:1]), "a row has other bits alone"
            return together, REFERENCE.grouped_experts(x, weights, ids, experts).double()

        yield f"grouped_experts {num_experts}x{size}", dtype, grouped


def _delta_net(context: Context) -> Iterator[Check]:
    """A prompt and a row that decodes, then the next token of both, over states in blocks."""
    key_heads, group, dim, block_size = context.choose((4, 2, 128, 64), (1, 2, 8, 4))
    prompt = context.choose(150, 6)
    keys, values = key_heads * dim, key_heads * group * dim
    for dtype in context.choose((torch.bfloat16, torch.float16, torch.float32), (torch.float32,)):
        weights = DeltaNetWeights(
            conv=torch.randn(4, 2 * keys + values, device=context.device),
            decay_log=torch.randn(key_heads * group, device=context.device),
            step_bias=torch.randn(key_heads * group, device=context.device),
            norm=torch.ones(dim, device=context.device),
            eps=1e-6,
            num_key_heads=key_heads,
            key_dim=dim,
            interleaved=True,
        )
        steps = [
            (torch.randn(count, 2 * (keys + values), device=context.device).to(dtype), lengths)
            for count, lengths in ((1 + prompt, (1, prompt)), (2, (2, prompt + 1)))
        ]
        table = torch.arange(1, 13, dtype=torch.int32, device=context.device).view(2, 6)

        def both(weights=weights, steps=steps, table=table) -> tuple[torch.Tensor, torch.Tensor]:
            found = []
            for kernels in (backend.active, REFERENCE):
                heads = key_heads * group // 2
                states = (
                    *(torch.zeros(13, heads, dim, dim, device=context.device) for _ in range(2)),
                    torch.zeros(13, 3, 2 * keys + values, device=context.device),
                )
                outputs = []
                for projected, lengths in steps:
                    starts = (0, 1, len(projected))
                    metadata = AttentionMetadata(
                        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=context.device),
                        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=context.device),
                        block_table=table,
                        slot_mapping=table.flatten().long(),
                        max_query_len=len(projected) - 1,
                        max_seq_len=max(lengths),
                        num_decode_rows=1,
                        block_size=block_size,
                    )
                    gates = projected[:, : 2 * key_heads * group].float().contiguous()
                    outputs.append(kernels.gated_delta_net(projected, gates, weights, states, metadata))
                found.append(torch.cat(outputs))
            return found[0], found[1].double()

        yield f"gated_delta_net {key_heads * group}x{dim}x{dim}", dtype, both


def _invariance(context: Context) -> Iterator[Check]:
    """A row alone and the same row among others, bit for bit (invariant 9)."""
    for head_dim, dtype in context.choose(((128, torch.bfloat16), (64, torch.float16)), ((16, torch.float32),)):
        rows = [(1, length) for length in context.choose((9000, 300, 17, 1) * 64, (40, 9, 1))]
        batch = make_batch(
            rows, num_heads=8, num_kv_heads=2, head_dim=head_dim, dtype=dtype, device=context.device, poisoned=True
        )

        def check(batch=batch) -> tuple[torch.Tensor, torch.Tensor]:
            together = batch.attend()
            alone = [batch.row(row).attend() for row in range(min(4, len(batch.rows)))]
            same = torch.equal(torch.cat(alone), together[: len(alone)])
            return torch.ones(1) if same else torch.zeros(1), torch.ones(1).double()

        yield f"a row alone and among {len(rows)}, head_dim={head_dim}", dtype, check


def _far_blocks(context: Context) -> Iterator[Check]:
    """Blocks at the far end of a cache of more than 2**31 numbers: offsets of 32 bits would wrap around."""
    heads, block_size, head_dim = context.choose((8, 16, 128), (2, 4, 16))
    num_blocks = context.choose((1 << 31) // (heads * block_size * head_dim) + 64, 70)
    dtype = context.choose(torch.bfloat16, torch.float32)

    tokens = 3 * block_size + 1
    key, value = (torch.randn(tokens, heads, head_dim, device=context.device).to(dtype) for _ in range(2))
    query = torch.randn(1, 2 * heads, head_dim, device=context.device).to(dtype)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_blocks, heads, block_size, head_dim)
        caches = [torch.zeros(shape, dtype=dtype, device=context.device) for _ in range(2)]
        blocks = torch.arange(num_blocks - 4, num_blocks, device=context.device)
        slots = (blocks[:, None] * block_size + torch.arange(block_size, device=context.device)).flatten()[:tokens]
        angles = torch.zeros(tokens, head_dim // 2, device=context.device)
        backend.active.rotate_and_store(
            torch.zeros_like(key), key, value, angles.cos(), angles.sin(), None, None, 1e-6, *caches, slots
        )
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32, device=context.device),
            seq_lens=torch.tensor([tokens], dtype=torch.int32, device=context.device),
            block_table=blocks.int().unsqueeze(0),
            slot_mapping=slots[-1:],
            max_query_len=1,
            max_seq_len=tokens,
            num_decode_rows=1,
        )
        actual = backend.active.paged_attention(query, *caches, metadata, head_dim**-0.5)
        wide = query.double().view(heads, 2, head_dim)
        weights = (torch.einsum("hgd,khd->hgk", wide, key.double()) * head_dim**-0.5).softmax(-1)
        return actual, torch.einsum("hgk,khd->hgd", weights, value.double()).reshape(1, 2 * heads, head_dim)

    yield f"the far end of a cache of {num_blocks} blocks", dtype, check


def _gather(context: Context) -> Iterator[Check]:
    """The step's inputs, equal to the twin's: rows that decode, rows of chunks, and padding."""
    slots, positions, blocks, size = context.choose((300, 4096, 256, 16), (5, 64, 4, 16))
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 1000, (slots, positions), generator=generator)
    table = torch.randint(1, 9999, (slots, blocks), generator=generator).int()
    lengths = [1] * (slots - 3) + [7, 40]
    computed = torch.randint(0, positions - 41, (len(lengths),), generator=generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)]).int()
    rows = torch.randperm(slots, generator=generator)[: len(lengths)]

    def filled(operators: KernelBackend, device: torch.device) -> torch.Tensor:
        into = StepTensors.allocate(int(starts[-1]) + slots - len(lengths), slots, blocks, device)
        tensors = [getattr(into, field.name) for field in fields(into)]
        for tensor in tensors:
            tensor.zero_()
        inputs = [tensor.to(device) for tensor in (rows, starts, computed)]
        operators.gather_step(pool.to(device), table.to(device), size, *inputs, max(lengths), into)
        return torch.cat([tensor.flatten().double() for tensor in tensors])

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        return filled(backend.active, context.device).cpu(), filled(REFERENCE, torch.device("cpu"))

    yield f"gather_step of {len(lengths)} rows", torch.float32, check


def main() -> None:
    """Print the results of a share of the checks."""
    share, count, out, *dry_run = sys.argv[1:]
    context = Context.create(Path(out), deadline=math.inf, dry_run=bool(dry_run))
    for entry in _results(context, int(share), int(count)):
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
