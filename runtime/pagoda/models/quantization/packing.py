"""From rows of quantized values, a few at a time, to a weight in the order in which the kernels read it."""

from __future__ import annotations

import dataclasses

import torch

from pagoda.models.quantization.rounding import QuantizedRows
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.types import PANEL, PackedWeight


class PackedWeightBuilder:
    """Takes the rows of a weight in order and packs whole panels of them, so that they are never all there unpacked."""

    def __init__(self, bits: int, out_features: int, in_features: int) -> None:
        self._bits = bits
        self._out_features = out_features
        self._in_features = in_features
        # Eight values of four bits, or four of eight, are a word of 32 bits, which packing moves like any other.
        self._words = empty_packed(out_features, in_features * bits // 32, torch.float32)
        # Of each row, filled up to whole panels: scales, zeros, and the scales of blocks where there are such.
        self._of_rows: list[torch.Tensor] = []
        self._group_size = 0
        self._num_rows = 0
        self._num_packed = 0
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
        assert self._num_rows, "a weight without rows"
        middle = 2 ** (self._bits - 1)
        self._words.values[-(-self._num_rows // PANEL) :].zero_()
        scales, zeros, *block_scales = self._of_rows
        has_mins = zeros.dtype != torch.uint8
        zeros[self._num_rows :] = 0 if has_mins else middle  # rows that fill the last panel
        if not block_scales and _are_half(scales) and (not has_mins or _are_half(zeros)):
            # As most checkpoints store them: half of what reading groups of 32 costs beside their values.
            scales, zeros = scales.half(), zeros.half() if has_mins else zeros
        return PackedWeight(
            self._words.values.view(torch.uint8).view(*self._words.values.shape, 4),
            self._out_features,
            self._in_features,
            _in_panels(scales),
            None if not has_mins and bool((zeros == middle).all()) else _in_panels(zeros),
            self._group_size,
            self._bits,
            _in_panels(block_scales[0]) if block_scales else None,
        )

    def _store(self, count: int) -> None:
        """Pack the first `count` rows of what is left over."""
        rows = _joined(self._left_over, self._bits)
        self._left_over = [_cut(rows, slice(count, None))] if len(rows.values) > count else []
        rows = _cut(rows, slice(0, count))
        assert rows.zeros is not None
        of_rows = [rows.scales, rows.zeros, *([] if rows.block_scales is None else [rows.block_scales])]
        if not self._num_packed:
            num_rows = len(self._words.values) * PANEL
            self._of_rows = [part.new_zeros(num_rows, *part.shape[1:]) for part in of_rows]
            self._group_size = rows.group_size
        here = slice(self._num_packed, self._num_packed + count)
        pack_into(self._words, here.start, _in_words(rows.values, self._bits))
        for kept, part in zip(self._of_rows, of_rows, strict=True):
            kept[here] = part
        self._num_packed += count


def _in_panels(of_rows: torch.Tensor) -> torch.Tensor:
    """[32 * P, …] to [P, …, 32]."""
    return of_rows.view(-1, PANEL, *of_rows.shape[1:]).movedim(1, -1).contiguous()


def _are_half(values: torch.Tensor) -> bool:
    """Whether float16 holds them all exactly."""
    return torch.equal(values.half().float(), values)


def _in_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values [N, K] in the words of a packed weight, [N, K * bits / 32], of a type that is not to be read as such."""
    if bits == 4:
        eights = values.view(len(values), -1, 2, 4)
        values = (eights[:, :, 0] | eights[:, :, 1] << 4).flatten(1)
    return values.contiguous().view(torch.float32)


def _joined(parts: list[QuantizedRows], bits: int) -> QuantizedRows:
    """The rows of all parts under each other, with zeros throughout."""
    middle = 2 ** (bits - 1)
    zeros = [
        torch.full_like(part.scales, middle, dtype=torch.uint8) if part.zeros is None else part.zeros for part in parts
    ]
    if len(parts) == 1:
        return dataclasses.replace(parts[0], zeros=zeros[0])
    blocks = [part.block_scales for part in parts if part.block_scales is not None]
    return QuantizedRows(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros),
        parts[0].group_size,
        torch.cat(blocks) if blocks else None,
    )


def _cut(rows: QuantizedRows, part: slice) -> QuantizedRows:
    assert rows.zeros is not None
    blocks = None if rows.block_scales is None else rows.block_scales[part]
    return QuantizedRows(rows.values[part], rows.scales[part], rows.zeros[part], rows.group_size, blocks)
