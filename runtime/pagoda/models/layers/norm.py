"""Normalization layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pagoda.models.layer_config import NormConfig
from pagoda.models.sharding import Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.tensor_group import TensorParallelGroup
from pagoda_kernels import backend


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, fused with the addition to the residual stream."""

    def __init__(self, size: int, norm: NormConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight_dtype = torch.float32 if norm.float32_weight else dtype
        self.weight = nn.Parameter(torch.empty(size, dtype=weight_dtype, device=device), requires_grad=False)
        self.eps = norm.eps
        self.offset = norm.offset

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """The layer's one tensor; `prefix` is the layer's own."""
        return {f"{prefix}weight": WeightTarget.whole(self.weight, self.offset)}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., size] to `(normed, new_residual)`, see `KernelBackend.rms_norm`."""
        return backend.active.rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(RMSNorm):
    """LayerNorm (Ba et al., 2016) without a bias, computed in float32 and rounded once."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RMSNorm`."""
        stream = x if residual is None else x + residual
        normed = F.layer_norm(stream.float(), self.weight.shape, self.weight.float(), eps=self.eps)
        return normed.to(x.dtype), stream


class WidthNorm(RMSNorm):
    """RMSNorm over a dimension of which this rank holds a part: the sums of squares are those of all ranks."""

    def __init__(
        self, shard: Shard, norm: NormConfig, group: TensorParallelGroup, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shard.size, norm, dtype=dtype, device=device)
        self.shard = shard
        self.group = group

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        """The part of the layer's one tensor."""
        return {f"{prefix}weight": WeightTarget(self.weight, (self.shard,), self.offset)}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RMSNorm`, for the part of x that is held here."""
        if self.group.size == 1:
            return super().forward(x.contiguous(), residual)
        stream = x if residual is None else x + residual
        wide = stream.float()
        squares = self.group.all_reduce(wide.square().sum(dim=-1, keepdim=True))
        # Where ranks hold the same KV head it counts as often as in the number of elements.
        normed = wide * (squares / (self.shard.size * self.group.size) + self.eps).rsqrt_()
        if self.weight.dtype == torch.float32:
            return normed.mul_(self.weight).to(x.dtype), stream
        return normed.to(x.dtype).mul_(self.weight), stream


def build_norm(size: int, norm: NormConfig, *, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    """A norm over `size` elements, all of which are held here."""
    kind = LayerNorm if norm.kind == "layer" else RMSNorm
    return kind(size, norm, dtype=dtype, device=device)
