"""From rows of quantized values, a few at a time, to a weight in the order in which the kernels read it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from pagoda.models.quantization.rounding import QuantizedRows
from pagoda_kernels.huge_pages import empty_on_huge_pages
from pagoda_kernels.linear import PANEL, PackedWeight, pack_int4, pack_int8


class PackedWeightBuilder:
    """Takes the rows of a weight in order and packs whole panels of them, so that they are never all there unpacked."""

    def __init__(self, bits: int, out_features: int, in_features: int) -> None:
        self._bits = bits
        self._out_features = out_features
        self._in_features = in_features
        self._packed: PackedWeight | None = None
        self._next_panel = 0
        self._num_rows = 0
        self._left_over: list[QuantizedRows] = []

    def append(self, rows: QuantizedRows) -> None:
        """The next rows; of the same group size as the ones before."""
        self._left_over.append(rows)
        self._num_rows += len(rows.values)
        count = sum(len(part.values) for part in self._left_over)
        if whole := count - count % PANEL:
            self._store(whole)

    def finish(self) -> PackedWeight:
        """The weight; rows up to `out_features` that were never given have no meaning."""
        if self._left_over:
            self._store(sum(len(part.values) for part in self._left_over))
        assert self._packed is not None, "a weight without rows"
        packed = self._packed
        assert packed.zeros is not None
        packed.zeros[:, self._num_rows :] = 2 ** (self._bits - 1)  # columns that fill the last panel
        if bool((packed.zeros == 2 ** (self._bits - 1)).all()):
            return dataclasses.replace(packed, zeros=None)
        return packed

    def _store(self, count: int) -> None:
        """Pack the first `count` rows of what is left over."""
        rows = _joined(self._left_over, self._bits)
        self._left_over = [_cut(rows, slice(count, None))] if len(rows.values) > count else []
        piece = _pack(_cut(rows, slice(0, count)), self._bits)
        packed = self._allocated_like(piece)
        first, last = self._next_panel, self._next_panel + len(piece.values)
        packed.values[first:last] = piece.values
        for whole, part in ((packed.scales, piece.scales), (packed.zeros, piece.zeros)):
            assert whole is not None
            assert part is not None
            whole[:, first * PANEL : last * PANEL] = part
        self._next_panel = last

    def _allocated_like(self, piece: PackedWeight) -> PackedWeight:
        if self._packed is None:
            panels = -(-self._out_features // PANEL)
            assert piece.scales is not None
            groups = len(piece.scales)
            self._packed = PackedWeight(
                empty_on_huge_pages((panels, *piece.values.shape[1:]), piece.values.dtype).zero_(),
                self._out_features,
                self._in_features,
                piece.scales.new_zeros((groups, panels * PANEL)),
                torch.full((groups, panels * PANEL), 2 ** (self._bits - 1), dtype=torch.uint8),
                piece.group_size,
                self._bits,
            )
        return self._packed


def _pack(rows: QuantizedRows, bits: int) -> PackedWeight:
    """One piece, with zeros throughout."""
    assert rows.zeros is not None
    if bits == 4:
        return pack_int4(rows.values, rows.scales, rows.zeros, rows.group_size)
    # The kernels' own packing knows one scale for each output only; their layout knows groups and zeros too.
    packed = pack_int8((rows.values.to(torch.int16) - 128).to(torch.int8), rows.scales[:, 0])
    scales, zeros = _columns_of_panels(rows.scales.float(), 0.0), _columns_of_panels(rows.zeros, 128)
    return dataclasses.replace(packed, scales=scales, zeros=zeros, group_size=rows.group_size)


def _columns_of_panels(rows: torch.Tensor, filling: float) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % PANEL), value=filling).T.contiguous()


def _joined(parts: list[QuantizedRows], bits: int) -> QuantizedRows:
    """The rows of all parts under each other, with zeros throughout."""
    middle = 2 ** (bits - 1)
    zeros = [
        torch.full_like(part.scales, middle, dtype=torch.uint8) if part.zeros is None else part.zeros for part in parts
    ]
    return QuantizedRows(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros),
        parts[0].group_size,
    )


def _cut(rows: QuantizedRows, part: slice) -> QuantizedRows:
    assert rows.zeros is not None
    return QuantizedRows(rows.values[part], rows.scales[part], rows.zeros[part], rows.group_size)
