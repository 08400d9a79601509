"""Sequences for the gated delta net, with states in a cache that starts full of NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights

BLOCK_SIZE, NUM_BLOCKS = 8, 40


@dataclass(frozen=True)
class Shape:
    num_key_heads: int = 2
    num_value_heads: int = 4
    key_dim: int = 16
    value_dim: int = 16
    conv_size: int = 4
    interleaved: bool = False


SHAPES = (
    Shape(),
    Shape(interleaved=True),
    Shape(num_key_heads=1, num_value_heads=3, key_dim=12, value_dim=20, interleaved=True),
    Shape(num_key_heads=3, num_value_heads=3, key_dim=7, value_dim=70, conv_size=2),
    Shape(num_key_heads=1, num_value_heads=1, key_dim=64, value_dim=130, conv_size=3),
)


class Sequence:
    """One sequence's inputs, and its blocks in a cache that starts full of NaN."""

    def __init__(self, shape: Shape, length: int, blocks: list[int], dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        keys, values = shape.num_key_heads * shape.key_dim, shape.num_value_heads * shape.value_dim
        self.projected = torch.randn(length, 2 * (keys + values), generator=generator).to(dtype)
        self.gates = torch.randn(length, 2 * shape.num_value_heads, generator=generator)
        self.blocks = blocks


def weights_of(shape: Shape) -> DeltaNetWeights:
    generator = torch.Generator().manual_seed(1)
    channels = 2 * shape.num_key_heads * shape.key_dim + shape.num_value_heads * shape.value_dim
    return DeltaNetWeights(
        conv=torch.randn(shape.conv_size, channels, generator=generator),
        decay_log=torch.randn(shape.num_value_heads, generator=generator),
        step_bias=torch.randn(shape.num_value_heads, generator=generator),
        norm=1 + 0.3 * torch.randn(shape.value_dim, generator=generator),
        eps=1e-6,
        num_key_heads=shape.num_key_heads,
        key_dim=shape.key_dim,
        interleaved=shape.interleaved,
    )


def new_states(shape: Shape, *, apart: int = 0) -> tuple[torch.Tensor, ...]:
    """As a worker makes them: pages of which a state may take a part only."""
    first = -(-shape.num_value_heads // 2)
    channels = 2 * shape.num_key_heads * shape.key_dim + shape.num_value_heads * shape.value_dim
    sizes = (
        (first, shape.key_dim, shape.value_dim),
        (shape.num_value_heads - first, shape.key_dim, shape.value_dim),
        (shape.conv_size - 1, channels),
    )
    states = []
    for size in sizes:
        numbers = torch.Size(size).numel()
        pages = torch.full((NUM_BLOCKS, numbers + apart), torch.nan)
        states.append(pages[:, :numbers].view(NUM_BLOCKS, *size))
    return tuple(states)


def run(
    kernels: KernelBackend,
    weights: DeltaNetWeights,
    states: tuple[torch.Tensor, ...],
    rows: list[tuple[Sequence, int, int]],
) -> list[torch.Tensor]:
    """One step: of each row its tokens from the first to before the second position."""
    counts = [end - begin for _, begin, end in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    width = max(len(sequence.blocks) for sequence, _, _ in rows)
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=torch.tensor([end for _, _, end in rows], dtype=torch.int32),
        block_table=torch.tensor(
            [each.blocks + [0] * (width - len(each.blocks)) for each, _, _ in rows], dtype=torch.int32
        ),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=max(end for _, _, end in rows),
        num_decode_rows=0,
        block_size=BLOCK_SIZE,
    )
    projected = torch.cat([each.projected[begin:end] for each, begin, end in rows])
    gates = torch.cat([each.gates[begin:end] for each, begin, end in rows])
    output = kernels.gated_delta_net(projected, gates, weights, states, metadata)
    return list(torch.split(output, counts))
