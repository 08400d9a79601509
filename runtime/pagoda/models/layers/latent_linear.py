"""`kv_b_proj` of multi-head latent attention, whose halves are multiplied by themselves: see `latent_attention`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from typing_extensions import override

from pagoda.models.layers.linear import Linear, LinearMethod, UnquantizedLinearMethod


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """What `kv_b_proj` has for each of `num_heads`: `key_dim` rows that make keys, and behind them `value_dim` for values."""

    num_heads: int
    key_dim: int
    value_dim: int

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a weight [num_heads * (key_dim + value_dim), rank], each [num_heads, rows, rank]."""
        by_head = weight.view(self.num_heads, -1, weight.shape[1])
        return by_head[:, : self.key_dim], by_head[:, self.key_dim :]


class LatentMethod(LinearMethod):
    """How `kv_b_proj` is kept where its halves are multiplied by themselves."""

    @abstractmethod
    def to_latent(self, layer: Linear, query: torch.Tensor) -> torch.Tensor:
        """Queries for keys [T, heads, key_dim] to queries for latents [T, heads, rank], maybe a view."""

    @abstractmethod
    def to_values(self, layer: Linear, attended: torch.Tensor) -> torch.Tensor:
        """Sums of latents [T, heads, rank] to sums of values [T, heads, value_dim], maybe a view."""


class FloatLatentMethod(UnquantizedLinearMethod, LatentMethod):
    """As it is in the checkpoint, multiplied by torch."""

    def __init__(self, heads: LatentHeads) -> None:
        self.heads = heads

    @override
    def to_latent(self, layer: Linear, query: torch.Tensor) -> torch.Tensor:
        keys, _ = self.heads.split(layer.weight)
        return torch.bmm(query.transpose(0, 1), keys).transpose(0, 1)

    @override
    def to_values(self, layer: Linear, attended: torch.Tensor) -> torch.Tensor:
        _, values = self.heads.split(layer.weight)
        return torch.bmm(attended.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)
