"""The mapping from parts of checkpoint tensors to parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda.models.sharding import Shard


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where a checkpoint tensor belongs: `destination`, a view of a parameter, and which part of each of its dimensions.

    The shape of `destination` is the length of each of `shards`; the stored tensor has their full sizes. `offset` is added to
    what is stored.
    """

    destination: torch.Tensor
    shards: tuple[Shard, ...]
    offset: float = 0.0

    @classmethod
    def whole(cls, destination: torch.Tensor, offset: float = 0.0) -> WeightTarget:
        """All of a tensor."""
        return cls(destination, tuple(Shard.whole(size) for size in destination.shape), offset)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        return tuple(shard.full_size for shard in self.shards)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the stored tensor."""
        return all(shard.is_whole for shard in self.shards)

    @property
    def index(self) -> tuple[slice, ...]:
        """The part of the stored tensor, one slice a dimension."""
        return tuple(shard.slice for shard in self.shards)
