"""Rounding of float weights to 8 and to 4 bits, to the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Some outputs of a layer: `weight[n, k] = scales[n, g] * (values[n, k] - zeros[n, g])`, input k being of group g.

    `values` uint8 [N, K]: 0 .. 255 for 8 bits, 0 .. 15 for 4. `scales` float32 and `zeros` uint8 are [N, G]; zeros of None:
    128, or 8; of float32: what a stored 0 stands for, `scales * values + zeros`. `group_size`: inputs of a group.
    `block_scales`: as in `PackedWeight`, float16 [N, B, 1], or [N, B, 2] with zeros; `scales` and zeros are int8 then.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int
    block_scales: torch.Tensor | None = None

    def dequantized(self, bits: int) -> torch.Tensor:
        """The weight, float32 [N, K]."""
        grouped = self.values.float().view(len(self.values), -1, self.group_size)
        scales = self.scales.unsqueeze(2)
        if self.zeros is not None and self.zeros.is_floating_point():
            return (grouped * scales + self.zeros.unsqueeze(2)).flatten(1)
        zeros = 2 ** (bits - 1) if self.zeros is None else self.zeros.float().unsqueeze(2)
        return ((grouped - zeros) * scales).flatten(1)


def round_rows(weight: torch.Tensor, bits: int, group_size: int | None, inputs: slice) -> QuantizedRows:
    """Round float rows [N, all inputs] and keep the columns `inputs` of them.

    8 bits without groups: symmetric, a scale for each output, from all its inputs, so that every way of sharing inputs gives
    the same values. Groups must begin and end where `inputs` does.
    """
    if bits == 8 and group_size is None:
        wide = weight.float()
        scales = wide.abs().amax(dim=1, keepdim=True).clamp_(min=_TINY) / 127
        values = _symmetric(wide[:, inputs], scales, 8)
        return QuantizedRows(values, scales, None, values.shape[1])
    part = weight if group_size is None else weight[:, inputs]
    groups = part.float().view(len(part), -1, group_size or part.shape[1])
    if bits == 8:
        scales = groups.abs().amax(dim=2).clamp_(min=_TINY) / 127
        values, zeros = _symmetric(groups, scales.unsqueeze(2), 8), None
    else:
        values, scales, zeros = _with_zeros(groups)
    kept = values.flatten(1) if group_size is not None else values.flatten(1)[:, inputs]
    return QuantizedRows(kept, scales, zeros, group_size or kept.shape[1])


def _symmetric(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    return (weight / scales).round_().add_(2 ** (bits - 1)).to(torch.uint8)


def _with_zeros(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4 bits over the range of each group, which always contains 0, stored exactly: values, scales and zeros."""
    low, high = groups.amin(dim=2).clamp_(max=0.0), groups.amax(dim=2).clamp_(min=0.0)
    scales = ((high - low) / 15).clamp_(min=_TINY)
    zeros = (-low / scales).round_().clamp_(0, 15)
    values = (groups / scales.unsqueeze(2)).add_(zeros.unsqueeze(2)).round_().clamp_(0, 15)
    return values.to(torch.uint8), scales, zeros.to(torch.uint8)
