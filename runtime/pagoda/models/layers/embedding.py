"""Token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TokenEmbedding(nn.Module):
    """The vector of each token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )

    def weight_targets(self, prefix: str) -> dict[str, torch.Tensor]:
        """The layer's one tensor; `prefix` is the layer's own."""
        return {f"{prefix}weight": self.weight}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] to [T, hidden_size]."""
        return F.embedding(token_ids, self.weight)
