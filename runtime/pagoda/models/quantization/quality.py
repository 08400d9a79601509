"""What a dtype or quantization costs a model: perplexity, and how far its predictions of given tokens are from others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pagoda.models.causal_lm import allocate_kv_caches
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.scheduling.kv_groups import KVSpec, RecurrentState
from pagoda_kernels.types import AttentionMetadata

WINDOW = 512
"""Tokens that a model sees at most: longer texts are scored in pieces."""

_BLOCK_SIZE = 16
_ROWS_OF_LOGITS = 64  # at a time: a vocabulary of 150 000 makes 37 MiB of float32 of them


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Token ids, of which those from `first` on are predicted from all before them; `first` is at least 1."""

    token_ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Scores:
    """For each predicted token its log-probability, float32 [N], and the id that was likeliest in its place, int64 [N]."""

    logprobs: torch.Tensor
    choices: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-self.logprobs.double().mean().item())

    def agreement(self, other: Scores) -> float:
        """Share of places with the same first choice."""
        return (self.choices == other.choices).double().mean().item()

    def logprob_error(self, other: Scores) -> float:
        """Mean absolute difference of the predicted tokens' log-probabilities."""
        return (self.logprobs.double() - other.logprobs.double()).abs().mean().item()


def in_windows(token_ids: Sequence[int]) -> list[ScoredText]:
    """A text in pieces of at most `WINDOW` tokens, each scored from its second token on."""
    pieces = (tuple(token_ids[start : start + WINDOW]) for start in range(0, len(token_ids), WINDOW))
    return [ScoredText(piece) for piece in pieces if len(piece) > 1]


def score(model: DecoderForCausalLM, texts: Sequence[ScoredText], progress: Callable[[], None]) -> Scores:
    """Let a loaded model, all of which this process holds, predict the texts; `progress` is called after each."""
    parts = []
    with torch.inference_mode():
        for text in texts:
            parts.append(_score(model, text))
            progress()
    return Scores(torch.cat([part.logprobs for part in parts]), torch.cat([part.choices for part in parts]))


def _score(model: DecoderForCausalLM, text: ScoredText) -> Scores:
    ids = torch.tensor(text.token_ids, device=model.device)
    count = len(ids)
    num_blocks = -(-count // _BLOCK_SIZE) + 1  # block 0 is the null block

    def zeros(shape: tuple[int, ...], spec: KVSpec) -> torch.Tensor:
        dtype = torch.float32 if isinstance(spec, RecurrentState) else model.dtype
        return torch.zeros((num_blocks, *shape), dtype=dtype, device=model.device)

    kv_caches = allocate_kv_caches(model.config.kv_specs, _BLOCK_SIZE, zeros)
    positions = torch.arange(count, device=model.device)
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, count], dtype=torch.int32, device=model.device),
        seq_lens=torch.tensor([count], dtype=torch.int32, device=model.device),
        block_table=torch.arange(1, num_blocks, dtype=torch.int32, device=model.device).unsqueeze(0),
        slot_mapping=positions + _BLOCK_SIZE,
        max_query_len=count,
        max_seq_len=count,
        num_decode_rows=int(count == 1),
    )
    hidden = model(ids, positions, kv_caches, [metadata])
    logprobs, choices = [], []
    predicting, predicted = hidden[text.first - 1 : -1], ids[text.first :]
    for start in range(0, len(predicted), _ROWS_OF_LOGITS):
        rows, targets = (part[start : start + _ROWS_OF_LOGITS] for part in (predicting, predicted))
        logits = model.compute_logits(rows.contiguous())
        assert logits is not None
        logprobs.append(logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1))
        choices.append(logits.argmax(dim=1))
    return Scores(torch.cat(logprobs), torch.cat(choices))
