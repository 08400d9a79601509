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
        self._scales = self._zeros = torch.empty(0)
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
        self._zeros[:, self._num_rows :] = middle  # columns that fill the last panel
        return PackedWeight(
            self._words.values.view(torch.uint8).view(*self._words.values.shape, 4),
            self._out_features,
            self._in_features,
            self._scales,
            None if bool((self._zeros == middle).all()) else self._zeros,
            self._group_size,
            self._bits,
        )

    def _store(self, count: int) -> None:
        """Pack the first `count` rows of what is left over."""
        rows = _joined(self._left_over, self._bits)
        self._left_over = [_cut(rows, slice(count, None))] if len(rows.values) > count else []
        rows = _cut(rows, slice(0, count))
        if not self._num_packed:
            columns = len(self._words.values) * PANEL
            self._scales = torch.zeros(rows.scales.shape[1], columns)
            self._zeros = torch.zeros(rows.scales.shape[1], columns, dtype=torch.uint8)
            self._group_size = rows.group_size
        here = slice(self._num_packed, self._num_packed + count)
        pack_into(self._words, here.start, _in_words(rows.values, self._bits))
        self._scales[:, here] = rows.scales.T
        assert rows.zeros is not None
        self._zeros[:, here] = rows.zeros.T
        self._num_packed += count


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
    return QuantizedRows(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros),
        parts[0].group_size,
    )


def _cut(rows: QuantizedRows, part: slice) -> QuantizedRows:
    assert rows.zeros is not None
    return QuantizedRows(rows.values[part], rows.scales[part], rows.zeros[part], rows.group_size)
