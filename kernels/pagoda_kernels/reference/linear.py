"""Torch twin of `pagoda_kernels.linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from pagoda_kernels.linear import PackedWeight


def pack(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """See `pagoda_kernels.linear.pack_into`."""
    rows = F.pad(weight, (0, 0, 0, -weight.shape[0] % 32))
    inputs = (weight.shape[1],) if weight.dtype == torch.float32 else (weight.shape[1] // 2, 2)
    packed.copy_(rows.view(-1, 32, *inputs).transpose(1, 2))


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The weight [out_features, in_features]: float as it was, quantized ones dequantized to float32."""
    values = weight.values
    if weight.bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=3)  # [P, K / 8, 32, 2, 4]
    order = (0, 2, 1, *range(3, values.dim()))
    rows = values.permute(order).reshape(-1, weight.in_features)[: weight.out_features]
    if weight.scales is None:
        return rows
    per_input = torch.arange(weight.in_features) // weight.group_size
    return (rows.float() - _zeros(weight)[:, per_input]) * _scales(weight)[:, per_input]


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `pagoda_kernels.linear.packed_linear`."""
    wide = x.float()
    if weight.scales is not None:
        wide = _quantized_and_back(wide, weight.group_size)
    product = wide @ unpack(weight).float().T
    return (product if bias is None else product + bias.float()).to(out_dtype or x.dtype)


def packed_rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `pagoda_kernels.linear.packed_rows`."""
    chosen = weight.values[ids // 32]  # [T, K, 32] or [T, K / 2, 32, 2]
    index = (ids % 32).view(-1, *(1,) * (chosen.dim() - 1))
    rows = torch.take_along_dim(chosen, index, dim=2)
    return rows.reshape(len(ids), weight.in_features).to(dtype)


def _quantized_and_back(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each group of a row's inputs rounded to a multiple of a 127th of its greatest magnitude."""
    missing = -x.shape[1] % group_size
    groups = F.pad(x, (0, missing)).view(len(x), -1, group_size)
    scales = groups.abs().amax(dim=2, keepdim=True) / 127
    rounded = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_() * scales
    return rounded.view(len(x), -1)[:, : x.shape[1]]


def _scales(weight: PackedWeight) -> torch.Tensor:
    assert weight.scales is not None
    return weight.scales.T[: weight.out_features]


def _zeros(weight: PackedWeight) -> torch.Tensor:
    if weight.zeros is None:
        return torch.full_like(_scales(weight), 2 ** (weight.bits - 1))
    return weight.zeros.T[: weight.out_features].float()
