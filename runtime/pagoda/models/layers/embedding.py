"""Token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import TensorParallelGroup


class TokenEmbedding(nn.Module):
    """The vector of each token of the vocabulary, all of which this rank holds."""

    def __init__(self, vocabulary: Shard, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.weight = nn.Parameter(
            torch.empty(vocabulary.size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """The layer's one tensor; `prefix` is the layer's own."""
        columns = Shard.whole(self.weight.shape[1])
        return {f"{prefix}weight": WeightTarget(self.weight[: self.vocabulary.length], (self.vocabulary, columns))}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] to [T, hidden_size]."""
        return F.embedding(token_ids, self.weight).to(self.dtype)

    def keep_in(self, dtype: torch.dtype) -> None:
        """Keep the vectors, which are not filled yet, in a narrower dtype than they are handed out in."""
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=dtype), requires_grad=False)


class VocabParallelEmbedding(TokenEmbedding):
    """The vectors of a vocabulary that is spread over the ranks of a group: one of them has a token's, the others add zero."""

    def __init__(
        self,
        vocabulary: Shard,
        hidden_size: int,
        *,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(vocabulary, hidden_size, dtype=dtype, device=device)
        self.group = group

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T], the same on all ranks, to [T, hidden_size], the same on all ranks."""
        rows = token_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= self.vocabulary.length)
        vectors = F.embedding(rows.masked_fill_(elsewhere, 0), self.weight).to(self.dtype)
        return self.group.all_reduce(vectors.masked_fill_(elsewhere.unsqueeze(1), 0))


def build_embedding(
    vocabulary: Shard, hidden_size: int, *, group: TensorParallelGroup, dtype: torch.dtype, device: torch.device
) -> TokenEmbedding:
    """The embedding of the share `vocabulary` that this rank of `group` holds."""
    if group.size == 1:
        return TokenEmbedding(vocabulary, hidden_size, dtype=dtype, device=device)
    return VocabParallelEmbedding(vocabulary, hidden_size, group=group, dtype=dtype, device=device)
