"""Packed weights made from whole float weights, to compare with those that are packed as they are loaded."""

from __future__ import annotations

import dataclasses

import torch

from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight


def pack(weight: torch.Tensor) -> PackedWeight:
    """A float32 or bfloat16 weight [out_features, in_features], packed whole, by the active backend."""
    out_features, in_features = weight.shape
    packed = empty_packed(out_features, in_features, weight.dtype)
    pack_into(packed, 0, weight)
    return packed


def quantize_int8(weight: torch.Tensor) -> PackedWeight:
    """Round a float weight to int8, symmetrically, with one scale for each output, and pack it."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return pack_int8((wide / scales.unsqueeze(1)).round_().to(torch.int8), scales)


def pack_int8(values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """Pack int8 `values` [out_features, in_features], whose outputs have `scales` [out_features]."""
    out_features, in_features = values.shape
    stored = _whole_panels((values.to(torch.int16) + 128).to(torch.uint8))
    packed = stored.view(-1, PANEL, in_features // 4, 4).transpose(1, 2).contiguous()
    padded = _in_panels(scales.float().unsqueeze(1))
    return PackedWeight(packed, out_features, in_features, padded, None, in_features, 8)


def quantize_int4(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Round a float weight to 4 bits, with a scale and a zero for every output and group of inputs, and pack it.

    The range of a group always contains 0, which is stored exactly.
    """
    out_features, in_features = weight.shape
    groups = weight.float().view(out_features, -1, group_size)
    low, high = groups.amin(dim=2).clamp_(max=0.0), groups.amax(dim=2).clamp_(min=0.0)
    scales = ((high - low) / 15).clamp_(min=torch.finfo(torch.float32).tiny)
    zeros = (-low / scales).round_().clamp_(0, 15)
    stored = (groups / scales.unsqueeze(2) + zeros.unsqueeze(2)).round_().clamp_(0, 15)
    return pack_int4(stored.view(out_features, in_features).to(torch.uint8), scales, zeros.to(torch.uint8), group_size)


def pack_int4(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> PackedWeight:
    """Pack uint8 `values` 0 .. 15 [out_features, in_features] with `scales` and `zeros` [out_features, G].

    `zeros` are 0 .. 15; None: 8 throughout.
    """
    out_features, in_features = values.shape
    eights = _whole_panels(values).view(-1, PANEL, in_features // 8, 2, 4).transpose(1, 2)
    packed = (eights[..., 0, :] | eights[..., 1, :] << 4).contiguous()
    padded_zeros = None if zeros is None else _in_panels(zeros.to(torch.uint8))
    padded_scales = _in_panels(scales.float())
    return PackedWeight(packed, out_features, in_features, padded_scales, padded_zeros, group_size, 4)


def with_mins(weight: PackedWeight, dtype: torch.dtype = torch.float16) -> PackedWeight:
    """A quantized weight of zeros as one of mins, what a stored 0 stands for, with scales of `dtype`."""
    assert weight.scales is not None
    middle = torch.full_like(weight.scales, 2 ** (weight.bits - 1))
    zeros = middle if weight.zeros is None else weight.zeros.float()
    scales = weight.scales.to(dtype)
    return dataclasses.replace(weight, scales=scales, zeros=(-zeros * weight.scales).to(dtype))


def with_block_scales(weight: PackedWeight) -> PackedWeight:
    """The stored values of a weight with zeros, or without, under other scales, in two levels; zeros become mins."""
    generator = torch.Generator().manual_seed(4)
    assert weight.scales is not None
    panels, groups, columns = weight.scales.shape
    levels = 1 if weight.zeros is None else 2
    numbers = torch.randint(-127, 128, (levels, panels, groups, columns), generator=generator, dtype=torch.int8)
    num_blocks = max(n for n in (1, 2, 5) if groups % n == 0)
    blocks = torch.rand(panels, num_blocks, levels, columns, generator=generator) - 0.5
    mins = None if weight.zeros is None else numbers[1]
    return dataclasses.replace(weight, scales=numbers[0], zeros=mins, block_scales=blocks.half())


def _in_panels(rows: torch.Tensor) -> torch.Tensor:
    """[N, G] to [P, G, 32]."""
    return _whole_panels(rows).view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _whole_panels(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))
