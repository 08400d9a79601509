"""Runs a model over a paged KV cache the way the engine does, and makes checkpoints to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loader import load_weights
from pagoda.models.registry import build_model
from pagoda_kernels.attention import AttentionMetadata


@dataclass
class Sequence_:
    """One sequence: all its tokens, how many are in the cache, and its blocks."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class PagedModel:
    """A model with its KV cache: give it sequences, then run steps of chosen numbers of tokens."""

    def __init__(
        self, model: DecoderForCausalLM, *, block_size: int = 16, num_blocks: int = 256, seed: int = 0
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # The cache starts full of NaN: whatever is read without having been written shows.
        self.kv_caches = [
            (torch.full(shape, torch.nan, dtype=model.dtype), torch.full(shape, torch.nan, dtype=model.dtype))
            for _ in range(config.num_layers)
        ]
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.free_blocks = order.tolist()
        self.sequences: list[Sequence_] = []

    def add(self, tokens: Sequence[int]) -> int:
        """A new sequence; returns its index."""
        self.sequences.append(Sequence_(list(tokens)))
        return len(self.sequences) - 1

    def step(self, scheduled: dict[int, int]) -> None:
        """Run `scheduled[i]` further tokens of sequence i for every i; appends logits of each token to the sequence."""
        rows = sorted(scheduled, key=lambda index: scheduled[index] != 1)
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for index in rows:
            sequence = self.sequences[index]
            end = sequence.num_computed + scheduled[index]
            assert end <= len(sequence.tokens)
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self.free_blocks.pop())
            for position in range(sequence.num_computed, end):
                input_ids.append(sequence.tokens[position])
                positions.append(position)
                block = sequence.blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            sequence.num_computed = end
            starts.append(len(input_ids))
        width = max(len(self.sequences[index].blocks) for index in rows) + 2
        tables = [self.sequences[index].blocks for index in rows]
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([self.sequences[index].num_computed for index in rows], dtype=torch.int32),
            block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            max_query_len=max(scheduled.values()),
            max_seq_len=max(self.sequences[index].num_computed for index in rows),
            num_decode_rows=sum(count == 1 for count in scheduled.values()),
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(input_ids), torch.tensor(positions), self.kv_caches, metadata)
            logits = self.model.compute_logits(hidden)
        for row, index in enumerate(rows):
            self.sequences[index].logits.extend(logits[starts[row] : starts[row + 1]])

    def logits_of(self, index: int) -> torch.Tensor:
        """Logits of every token run so far, float32 [tokens, vocab_size]."""
        return torch.stack(self.sequences[index].logits)


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderForCausalLM:
    """The checkpoint in `directory`, in `dtype` on the CPU."""
    model = build_model(ModelConfig.from_directory(directory), dtype, "cpu")
    load_weights(model, directory)
    return model
