"""Packed weights as they are filled: allocated on huge pages, written some rows at a time."""

from __future__ import annotations

import torch

from pagoda_kernels import backend
from pagoda_kernels.huge_pages import empty_on_huge_pages
from pagoda_kernels.types import PANEL, PackedWeight


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
