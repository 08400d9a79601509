"""Token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.tensor_group import TensorParallelGroup
from pagoda_kernels import backend
from pagoda_kernels.types import PANEL, PackedWeight


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


class PackedEmbedding(TokenEmbedding):
    """The vectors of a vocabulary, looked up in the packed weight of the head that shares them; of a rank, its own share."""

    def __init__(self, vocabulary: Shard, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # no weight of its own
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.packed: PackedWeight | None = None

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """None: the head loads the weight."""
        return {}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] to [T, hidden_size]."""
        assert self.packed is not None, "the embedding is not loaded"
        if self.packed.scales is not None:
            return quantized_rows(self.packed, token_ids).to(self.dtype)
        return backend.active.packed_rows(self.packed, token_ids, self.dtype)


class VocabParallelPackedEmbedding(PackedEmbedding):
    """The same where the vocabulary is spread over ranks: one of them has a token's vector, the others add zero."""

    def __init__(self, vocabulary: Shard, dtype: torch.dtype, group: TensorParallelGroup) -> None:
        super().__init__(vocabulary, dtype)
        self.group = group

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T], the same on all ranks, to [T, hidden_size], the same on all ranks."""
        rows = token_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= self.vocabulary.length)
        vectors = super().forward(rows.masked_fill_(elsewhere, 0))
        return self.group.all_reduce(vectors.masked_fill_(elsewhere.unsqueeze(1), 0))


def quantized_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a quantized weight, dequantized: int64 ids [T] to float32 [T, in_features]."""
    assert weight.scales is not None
    panels, columns = ids // PANEL, ids % PANEL
    stored = weight.values[panels, :, columns]  # [T, K / 4 or K / 8, 4]
    if weight.bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=2)
    wide = stored.reshape(len(ids), -1, weight.group_size).float()

    def of_groups(numbers: torch.Tensor, level: int) -> torch.Tensor:
        chosen = numbers[panels, :, columns].float()  # [T, G]
        if weight.block_scales is not None:
            blocks = weight.block_scales[panels, :, level, columns].float()
            chosen = (chosen.view(*blocks.shape, -1) * blocks.unsqueeze(2)).flatten(1)
        return chosen.unsqueeze(2)

    scales = of_groups(weight.scales, 0)
    if weight.zeros is None:
        return wide.sub_(2 ** (weight.bits - 1)).mul_(scales).flatten(1)
    zeros = of_groups(weight.zeros, 1)
    return (wide.mul_(scales).add_(zeros) if weight.has_mins else wide.sub_(zeros).mul_(scales)).flatten(1)


def build_embedding(
    vocabulary: Shard,
    hidden_size: int,
    *,
    group: TensorParallelGroup,
    dtype: torch.dtype,
    device: torch.device,
    in_packed_head: bool = False,
) -> TokenEmbedding:
    """The embedding of the share `vocabulary` that this rank of `group` holds; `in_packed_head`: the head has its weight."""
    if in_packed_head:
        if group.size == 1:
            return PackedEmbedding(vocabulary, dtype)
        return VocabParallelPackedEmbedding(vocabulary, dtype, group)
    if group.size == 1:
        return TokenEmbedding(vocabulary, hidden_size, dtype=dtype, device=device)
    return VocabParallelEmbedding(vocabulary, hidden_size, group=group, dtype=dtype, device=device)
