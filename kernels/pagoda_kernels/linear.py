"""Linear layers over packed weights: float32, bfloat16, int8 or int4, in the order in which a kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_kernels import backend
from pagoda_kernels.huge_pages import empty_on_huge_pages

PANEL = 32
"""Outputs that lie next to each other in a packed weight; the last panel is filled up with zeros."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out_features, in_features]` in panels of 32 outputs, P of them.

        float32    values float32  [P, in_features, 32]          values[p, k, c] = weight[32p + c, k]
        bfloat16   values bfloat16 [P, in_features / 2, 32, 2]   values[p, j, c, i] = weight[32p + c, 2j + i]
        int8       values uint8    [P, in_features / 4, 32, 4]   values[p, j, c, i] = q[32p + c, 4j + i] + 128
        int4       values uint8    [P, in_features / 8, 32, 4]   low  four bits: q[32p + c, 8j + i]
                                                                 high four bits: q[32p + c, 8j + 4 + i]

    Quantized weights have a scale for every output and every group of `group_size` consecutive inputs, G groups:
    `weight[n, k] = scales[k // group_size, n] * (stored - zeros[k // group_size, n])`, where `stored` is 0 .. 255 (int8, with
    the 128 in it) or 0 .. 15 (int4). `scales` float32 and `zeros` uint8 are `[G, 32 * P]`; zeros of None are 128, and 8.
    `in_features` must be even for bfloat16, a multiple of 4 for int8 and of 8 for int4, and so must `group_size`.
    """

    values: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    group_size: int = 0
    bits: int = 32

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.zeros) if tensor is not None)


def packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for x float32 or bfloat16 [T, in_features], contiguous; returns [T, out_features].

    Sums are float32, and every row's bits are the same alone and in any batch. `out_dtype`: float32, which leaves the sums
    as they are, or None, which rounds them to the dtype of x. For quantized weights, each row of x is quantized too: to int8,
    symmetrically, a scale for every group of inputs.
    """
    return backend.active.packed_linear(x, weight, bias, out_dtype)


def packed_rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a float weight by int64 `ids` [T], as an embedding that shares it has them: [T, in_features] of `dtype`."""
    return backend.active.packed_rows(weight, ids, dtype)


def pack(weight: torch.Tensor) -> PackedWeight:
    """Pack a float32 or bfloat16 weight [out_features, in_features] without a change of its values.

    A bfloat16 weight with an odd number of inputs is packed as float32.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"float32 and bfloat16 weights can be packed, not {weight.dtype}")
    out_features, in_features = weight.shape
    packed = empty_packed(out_features, in_features, weight.dtype)
    pack_into(packed, 0, weight)
    return packed


def empty_packed(out_features: int, in_features: int, dtype: torch.dtype) -> PackedWeight:
    """Room for a weight in float32 or bfloat16 (float32 where the number of inputs is odd), to be filled by `pack_into`."""
    panels = -(-out_features // PANEL)
    if dtype == torch.float32 or in_features % 2:
        values = empty_on_huge_pages((panels, in_features, PANEL), torch.float32)
        return PackedWeight(values, out_features, in_features, bits=32)
    values = empty_on_huge_pages((panels, in_features // 2, PANEL, 2), dtype)
    return PackedWeight(values, out_features, in_features, bits=16)


def pack_into(packed: PackedWeight, first_row: int, rows: torch.Tensor) -> None:
    """Put `rows` [N, in_features] into a float weight from `first_row` on, a multiple of 32. The rest of a panel is zeros."""
    first, last = first_row // PANEL, -(-(first_row + len(rows)) // PANEL)
    backend.active.pack(rows.to(packed.values.dtype).contiguous(), packed.values[first:last])


def quantize_int8(weight: torch.Tensor) -> PackedWeight:
    """Round a float weight to int8, symmetrically, with one scale for each output, and pack it."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return pack_int8((wide / scales.unsqueeze(1)).round_().to(torch.int8), scales)


def pack_int8(values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """Pack int8 `values` [out_features, in_features], whose outputs have `scales` [out_features]."""
    out_features, in_features = values.shape
    _check_multiple("in_features", in_features, 4)
    stored = _whole_panels((values.to(torch.int16) + 128).to(torch.uint8))
    packed = stored.view(-1, PANEL, in_features // 4, 4).transpose(1, 2).contiguous()
    padded = _whole_panels(scales.float().unsqueeze(1)).T.contiguous()
    return PackedWeight(packed, out_features, in_features, padded, None, in_features, 8)


def quantize_int4(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Round a float weight to 4 bits, with a scale and a zero for every output and group of inputs, and pack it.

    The range of a group always contains 0, which is stored exactly.
    """
    out_features, in_features = weight.shape
    _check_multiple("in_features", in_features, group_size)
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
    _check_multiple("in_features", in_features, 8)
    _check_multiple("group_size", group_size, 8)
    eights = _whole_panels(values).view(-1, PANEL, in_features // 8, 2, 4).transpose(1, 2)
    packed = (eights[..., 0, :] | eights[..., 1, :] << 4).contiguous()
    padded_zeros = None if zeros is None else _whole_panels(zeros.to(torch.uint8)).T.contiguous()
    padded_scales = _whole_panels(scales.float()).T.contiguous()
    return PackedWeight(packed, out_features, in_features, padded_scales, padded_zeros, group_size, 4)


def _whole_panels(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))


def _check_multiple(name: str, value: int, unit: int) -> None:
    if unit < 1 or value % unit:
        raise ValueError(f"{name}={value} must be a multiple of {unit}")
