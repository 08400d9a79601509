"""Packed linear layers in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import PANEL, PackedWeight


class ReferenceLinear(KernelBackend):
    """Products with packed weights, and packing."""

    @override
    def packed_linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        wide = x.float()
        if weight.scales is not None:
            wide = _quantized_and_back(wide, weight.group_size)
        product = wide @ unpack(weight).float().T
        return (product if bias is None else product + bias.float()).to(out_dtype or x.dtype)

    @override
    def packed_linear_heads(self, x: torch.Tensor, weight: PackedWeight, out_features: int) -> torch.Tensor:
        by_head = unpack(weight).float().view(x.shape[1], -1, x.shape[2])[:, :out_features]
        return torch.einsum("thi,hoi->tho", x.float(), by_head).to(x.dtype)

    @override
    def packed_rows(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        chosen = weight.values[ids // PANEL]  # [T, K, 32] or [T, K / 2, 32, 2]
        index = (ids % PANEL).view(-1, *(1,) * (chosen.dim() - 1))
        rows = torch.take_along_dim(chosen, index, dim=2)
        return rows.reshape(len(ids), weight.in_features).to(dtype)

    @override
    def pack(self, weight: torch.Tensor, panels: torch.Tensor) -> None:
        rows = F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL))
        inputs = (weight.shape[1],) if weight.dtype == torch.float32 else (weight.shape[1] // 2, 2)
        panels.copy_(rows.view(-1, PANEL, *inputs).transpose(1, 2))


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
    scales, zeros = (
        numbers.transpose(1, 2).flatten(0, 1)[: weight.out_features, per_input]
        for numbers in (weight.group_scales(), weight.group_zeros())
    )
    return rows.float() * scales + zeros if weight.has_mins else (rows.float() - zeros) * scales


def _quantized_and_back(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each group of a row's inputs rounded to a multiple of a 127th of its greatest magnitude."""
    missing = -x.shape[1] % group_size
    groups = F.pad(x, (0, missing)).view(len(x), -1, group_size)
    scales = groups.abs().amax(dim=2, keepdim=True) / 127
    rounded = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_() * scales
    return rounded.view(len(x), -1)[:, : x.shape[1]]
