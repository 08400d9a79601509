"""What the layers of a rank's model are built with: dtype, device, ranks, and how each linear layer keeps its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pagoda.models.layer_config import NormConfig
from pagoda.models.layers.latent_linear import FloatLatentMethod, LatentHeads
from pagoda.models.layers.linear import Linear, LinearMethod, RowParallelLinear
from pagoda.models.layers.norm import RMSNorm, WidthNorm, build_norm
from pagoda.models.sharding import Shard
from pagoda.parallel.tensor_group import TensorParallelGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearKind:
    """What a linear layer is for, where its weight is kept in another way for that."""

    is_router: bool = False
    is_head: bool = False
    latent_heads: LatentHeads | None = None


# Prefix of a layer, its inputs, its parts and its kind, to its method; None: floats that torch multiplies.
ChooseMethod = Callable[[str, Shard, Mapping[str, Shard], LinearKind], LinearMethod | None]


def unquantized(prefix: str, inputs: Shard, parts: Mapping[str, Shard], kind: LinearKind) -> None:
    """Floats, for every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBuilder:
    """Builds the parts of a model for one rank of `group`; linear layers have their method from birth."""

    norm: NormConfig
    group: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    choose_method: ChooseMethod = unquantized

    def linear(
        self,
        prefix: str,
        inputs: Shard,
        parts: Mapping[str, Shard],
        *,
        bias: bool = False,
        out_dtype: torch.dtype | None = None,
        is_router: bool = False,
        weight: torch.Tensor | None = None,
    ) -> Linear:
        """A layer whose outputs are spread over the ranks. A router's are float32: experts are chosen by them.

        `weight`: where its floats are kept; None: by themselves.
        """
        return Linear(
            inputs,
            parts,
            bias=bias,
            dtype=self.dtype,
            device=self.device,
            out_dtype=torch.float32 if is_router else out_dtype,
            prefix=prefix,
            method=self.choose_method(prefix, inputs, parts, LinearKind(is_router=is_router)),
            weight=None if weight is None else nn.Parameter(weight, requires_grad=False),
        )

    def keeps_floats(self, prefix: str, inputs: Shard, parts: Mapping[str, Shard]) -> bool:
        """Whether such a layer keeps its weight as the checkpoint has it, in the model's dtype."""
        return self.choose_method(prefix, inputs, parts, LinearKind()) is None

    def latent_linear(self, prefix: str, rank: Shard, parts: Mapping[str, Shard], heads: LatentHeads) -> Linear:
        """A layer from latents to keys and values of this rank's heads; its method is a `LatentMethod`."""
        method = self.choose_method(prefix, rank, parts, LinearKind(latent_heads=heads))
        return Linear(
            rank,
            parts,
            bias=False,
            dtype=self.dtype,
            device=self.device,
            prefix=prefix,
            method=method or FloatLatentMethod(heads),
        )

    def row_parallel(
        self, prefix: str, inputs: Shard, parts: Mapping[str, Shard], *, bias: bool = False
    ) -> RowParallelLinear:
        """A layer whose inputs are spread over the ranks, and whose outputs are summed."""
        return RowParallelLinear(
            inputs,
            parts,
            bias=bias,
            group=self.group,
            dtype=self.dtype,
            device=self.device,
            prefix=prefix,
            method=self.choose_method(prefix, inputs, parts, LinearKind()),
        )

    def rms_norm(self, size: int) -> RMSNorm:
        """A norm of the model's kind."""
        return build_norm(size, self.norm, dtype=self.dtype, device=self.device)

    def width_norm(self, shard: Shard) -> WidthNorm:
        """A norm over a dimension that is spread over the ranks."""
        return WidthNorm(shard, self.norm, self.group, dtype=self.dtype, device=self.device)
