"""Turns generated documents into training batches; a batch follows from the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from generate_data import EARLY, LONG, SHORT, Mixture, Pieces, document
from tokenizers import Tokenizer

# Row lengths and their shares, by the part of the run they hold from: short rows first, long recall when lookup works.
CURRICULUM: list[tuple[float, dict[int, float]]] = [
    (0.00, {96: 0.4, 256: 0.6}),
    (0.15, {96: 0.35, 256: 0.35, 512: 0.15, 1024: 0.15}),
    (0.40, {96: 0.35, 256: 0.30, 512: 0.10, 1024: 0.10, 2048: 0.15}),
]
FIRST_TOKEN_WEIGHT = 3.0  # the first token of an answer says where to look, the others follow
TOKENS_PER_STEP = 4096
EARLY_UNTIL = 0.04  # part of the run with the early mixture


def mixture_of(length: int, progress: float) -> Mixture:
    """What rows of `length` tokens hold at this point of the run."""
    if length < 256:
        return SHORT
    if length >= 1024:
        return LONG
    return EARLY if progress < EARLY_UNTIL else Mixture()


@dataclass(frozen=True)
class Batch:
    """`input_ids` int64 [rows, length]; `positions`, `targets` int64 [n], `weights` float32 [n] as DemoModel.loss takes."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        moved = (tensor.to(device) for tensor in (self.input_ids, self.positions, self.targets, self.weights))
        return Batch(*moved)


class BatchMaker:
    """Makes one rank's share of each batch; remembers the ids of short pieces, which come again and again."""

    def __init__(self, tokenizer: Tokenizer, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.tokenizer, self.seed, self.rank, self.ranks = tokenizer, seed, rank, ranks
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self.known.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self.known) < 200_000:
                self.known[text] = ids
        return ids

    def fits(self, pieces: Pieces, room: int) -> bool:
        return sum(len(self.encode(text)) for text, _ in pieces) <= room

    def make(self, step: int, progress: float) -> Batch:
        """The batch of `step`; `progress` (0 to 1) chooses the lengths."""
        shares = [shares for start, shares in CURRICULUM if progress >= start][-1]
        length = Random(f"{self.seed}/{step}").choices(list(shares), list(shares.values()))[0]
        rows = max(1, TOKENS_PER_STEP // length // self.ranks)
        random = Random(f"{self.seed}/{step}/{self.rank}")
        mixture = mixture_of(length, progress)
        input_ids = torch.zeros(rows, length, dtype=torch.int64)
        positions, targets, weights = [], [], []
        for row in range(rows):
            pieces = document(random, length, mixture, lambda pieces: self.fits(pieces, length))
            column = 0
            for text, weight in pieces:
                for index, token in enumerate(self.encode(text)[: length - column]):
                    input_ids[row, column] = token
                    if weight and column:
                        positions.append(row * length + column - 1)
                        targets.append(token)
                        weights.append(weight if index else weight * FIRST_TOKEN_WEIGHT)
                    column += 1
        return Batch(
            input_ids, torch.tensor(positions), torch.tensor(targets), torch.tensor(weights, dtype=torch.float32)
        )
