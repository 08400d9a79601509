"""Runs a model over a paged KV cache the way the engine does, and makes checkpoints with transformers to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from pagoda.models.build import build_model
from pagoda.models.causal_lm import allocate_kv_caches
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.loader import load_weights
from pagoda.scheduling.kv_groups import RecurrentState
from pagoda_kernels.types import AttentionMetadata

CHUNKS = (1, 7, 1, 40)


@dataclass
class CachedSequence:
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
        # The cache starts full of NaN: whatever is read without having been written shows.
        self.kv_caches = allocate_kv_caches(
            config.kv_specs,
            block_size,
            lambda shape, spec: torch.full(
                (num_blocks, *shape),
                torch.nan,
                dtype=torch.float32 if isinstance(spec, RecurrentState) else model.dtype,
            ),
        )
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.free_blocks = order.tolist()
        self.sequences: list[CachedSequence] = []

    def add(self, tokens: Sequence[int]) -> int:
        """A new sequence; returns its index."""
        self.sequences.append(CachedSequence(list(tokens)))
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
            block_size=self.block_size,
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(input_ids), torch.tensor(positions), self.kv_caches, [metadata])
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


def model_class(config: Any) -> Any:
    """transformers' language model for a configuration."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    # Some are meant to be a part of another model only.
    return found or getattr(transformers, type(config).__name__.removesuffix("Config") + "ForCausalLM")


def save_random_checkpoint(
    config: Any, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", seed: int = 0
) -> Any:
    """Save a random model of a transformers `config` to `directory`; returns transformers' model, in `dtype`.

    Every weight is random, norms and biases too, and large enough that logits are far from flat and attention is sharp.
    """
    model = model_class(config)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.0 if "embed_tokens" in name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def run_in_chunks(model: DecoderForCausalLM, prompts: list[list[int]], *, block_size: int) -> list[torch.Tensor]:
    """Logits [tokens, vocab_size] of every position of every prompt, from one batch in ever changing chunks.

    Sequence i moves by a step of `CHUNKS[(round + i) % 4]` tokens, so that decode rows, short and long chunks, fresh and
    continued, meet in the same step.
    """
    paged = PagedModel(model, block_size=block_size)
    for prompt in prompts:
        paged.add(prompt)
    for turn in range(max(map(len, prompts))):
        left = {i: len(sequence.tokens) - sequence.num_computed for i, sequence in enumerate(paged.sequences)}
        scheduled = {i: min(count, CHUNKS[(turn + i) % len(CHUNKS)]) for i, count in left.items() if count}
        if not scheduled:
            break
        paged.step(scheduled)
    return [paged.logits_of(i) for i in range(len(prompts))]
