"""The parts of a step on a CPU, each alone, beside what the machine can read and multiply.

    python benchmarks/cpu_layer.py [--rows 1 8 32] [--weights bf16 int8 int4] [--context 64] [--level avx512_bf16]

Linears, attention, what stands between, the head; the shapes are Qwen3-0.6B's. Weights and KV cache are there several times,
and used in turn as by the layers of a step, so that each comes from memory. Times are the least of several rounds, in which
all parts take turns; GB/s counts weights, or keys and values, once.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagoda_kernels import backend
from pagoda_kernels.huge_pages import empty_on_huge_pages, zeros_on_huge_pages
from pagoda_kernels.types import PANEL, AttentionMetadata, PackedWeight

MEMORY_BYTES = 128 << 20  # of each part's weights or caches: more than the processor's caches hold
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, UNITS, VOCABULARY = 28, 1024, 16, 8, 128, 3072, 151_936
LINEARS = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "output": (HEADS * HEAD_DIM, HIDDEN),
    "gate and up": (HIDDEN, 2 * UNITS),
    "down": (UNITS, HIDDEN),
}
BLOCK_SIZE = 16
GROUP = 128  # inputs of a group of int4 weights


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a step does `times` times, each time on other memory: `run(index)`."""

    name: str
    times: int
    bytes_read: int
    flops: int
    run: Callable[[int], object]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--weights", nargs="+", choices=("bf16", "fp32", "int8", "int4"), default=["bf16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=64, help="tokens of each sequence in the KV cache")
    parser.add_argument("--level", help="instruction set, of those that the processor has")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from pagoda_kernels.cpu.operators import active_level, use_level  # loads the library

    if options.level:
        use_level(options.level)
    backend.use_backend("cpu")
    limits = [machine_read(), machine_gemm()]
    print(f"{options.threads} threads, {active_level()}, load {os.getloadavg()[0]:.1f}")
    for weights in options.weights:
        packed = {name: random_weights(*shape, weights) for name, shape in LINEARS.items()}
        head = random_weight(HIDDEN, VOCABULARY, weights)
        for rows in options.rows:
            between = other_parts(rows, options.context, weights == "fp32")
            parts = [*limits, *linear_parts(packed, rows), *between, *head_parts(head, rows)]
            report(weights, rows, parts, options.rounds)


def machine_read() -> Part:
    """What `limits.py` measures, on huge pages and of less."""
    values = zeros_on_huge_pages((2**26,), torch.float32).fill_(1.0)
    return Part("machine: sum", 1, values.nbytes, 0, lambda _: values.sum())


def machine_gemm() -> Part:
    """What `limits.py` measures."""
    left, right = torch.rand(512, 1024, dtype=torch.bfloat16), torch.rand(3072, 1024, dtype=torch.bfloat16)
    return Part("machine: product", 1, 0, 2 * 512 * 1024 * 3072, lambda _: torch.nn.functional.linear(left, right))


def random_weights(inputs: int, outputs: int, weights: str) -> list[PackedWeight]:
    """As many layers' as fill `MEMORY_BYTES`."""
    first = random_weight(inputs, outputs, weights)
    return [first, *(random_weight(inputs, outputs, weights) for _ in range(MEMORY_BYTES // first.values.nbytes))]


def random_weight(inputs: int, outputs: int, weights: str) -> PackedWeight:
    """A packed weight whose values do not matter, with sensible scales."""
    panels = math.ceil(outputs / PANEL)
    if weights == "fp32":
        values = empty_on_huge_pages((panels, inputs, PANEL), torch.float32).fill_(0.01)
        return PackedWeight(values, outputs, inputs, bits=32)
    if weights == "bf16":
        values = empty_on_huge_pages((panels, inputs // 2, PANEL, 2), torch.bfloat16).fill_(0.01)
        return PackedWeight(values, outputs, inputs, bits=16)
    unit, group = (8, GROUP) if weights == "int4" else (4, inputs)
    values = empty_on_huge_pages((panels, inputs // unit, PANEL, 4), torch.uint8).fill_(0x7A)
    scales = torch.full((panels, inputs // group, PANEL), 0.01)
    return PackedWeight(values, outputs, inputs, bits=32 // unit, scales=scales, group_size=group)


def linear_parts(packed: dict[str, list[PackedWeight]], rows: int) -> list[Part]:
    """The four products of a layer."""
    parts = []
    for name, layers in packed.items():
        inputs, outputs = LINEARS[name]
        x = torch.randn(rows, inputs).to(torch.bfloat16 if layers[0].bits != 32 else torch.float32)
        parts.append(
            Part(
                name,
                LAYERS,
                layers[0].values.nbytes,
                2 * rows * inputs * outputs,
                lambda index, x=x, layers=layers: backend.active.packed_linear(x, layers[index % len(layers)]),
            )
        )
    return parts


def head_parts(head: PackedWeight, rows: int) -> list[Part]:
    """Logits and the greedy choice."""
    x = torch.randn(rows, HIDDEN).to(torch.bfloat16 if head.bits != 32 else torch.float32)
    logits = torch.randn(rows, VOCABULARY)
    return [
        Part(
            "head",
            1,
            head.values.nbytes,
            2 * rows * HIDDEN * VOCABULARY,
            lambda _: backend.active.packed_linear(x, head, out_dtype=torch.float32),
        ),
        Part("greedy", 1, logits.nbytes, 0, lambda _: backend.active.greedy_sample(logits)),
    ]


def other_parts(rows: int, context: int, wide: bool) -> list[Part]:
    """What stands between the products of a layer."""
    dtype = torch.float32 if wide else torch.bfloat16
    blocks = math.ceil(context / BLOCK_SIZE)
    layer_bytes = 2 * rows * context * KV_HEADS * HEAD_DIM * dtype.itemsize
    copies = min(LAYERS, 1 + MEMORY_BYTES // layer_bytes)
    caches = zeros_on_huge_pages((2, copies, rows * blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype).normal_()
    # Blocks of a sequence lie anywhere, as they do when sequences have come and gone.
    table = torch.randperm(rows * blocks).to(torch.int32).view(rows, blocks)
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.full((rows,), context, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.arange(rows),
        num_decode_rows=rows,
        max_query_len=1,
        max_seq_len=context,
    )
    query = torch.randn(rows, HEADS, HEAD_DIM).to(dtype)
    x, weight = torch.randn(rows, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    gate_up = torch.randn(rows, 2 * UNITS).to(dtype)
    attention = Part(
        f"attention over {context}",
        LAYERS,
        layer_bytes,
        0,
        lambda index: backend.active.paged_attention(
            query, caches[0, index % copies], caches[1, index % copies], metadata, 0.1
        ),
    )
    norm = Part("norm", 2 * LAYERS, 0, 0, lambda _: backend.active.rms_norm(x, weight, 1e-6, x))
    return [attention, norm, Part("silu", LAYERS, 0, 0, lambda _: backend.active.silu_and_mul(gate_up))]


def report(weights: str, rows: int, parts: list[Part], rounds: int) -> None:
    """Measure `parts` in turn and print a table."""
    best = dict.fromkeys(range(len(parts)), math.inf)
    for _ in range(rounds):
        for number, part in enumerate(parts):
            began = time.perf_counter()
            for index in range(part.times):
                part.run(index)
            best[number] = min(best[number], time.perf_counter() - began)
    print(f"\n{weights}, {rows} rows\n\n| part | times | µs each | ms a step | GB/s | GFLOP/s |")
    print("|---|---:|---:|---:|---:|---:|")
    total = read = 0.0
    for number, part in enumerate(parts):
        seconds, moved, worked = best[number], part.times * part.bytes_read, part.times * part.flops
        if not part.name.startswith("machine"):
            total, read = total + seconds, read + moved
        print(
            f"| {part.name} | {part.times} | {1e6 * seconds / part.times:.1f} | {1e3 * seconds:.2f} "
            f"| {moved / seconds / 1e9:.1f} | {worked / seconds / 1e9:.0f} |"
        )
    print(f"| sum | | | {1e3 * total:.2f} | {read / total / 1e9:.1f} | |")


if __name__ == "__main__":
    main()
