"""Low-rank adapters in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend, LoraBatch, LoraLinear
from pagoda_kernels.types import LoraLimits


class ReferenceLoraBatch:
    """Whose rows are whose, as a tensor."""

    def __init__(self) -> None:
        self.slots: torch.Tensor | None = None

    def set(self, slots: torch.Tensor | None) -> None:
        """See `LoraBatch`."""
        self.slots = slots

    def expect(self, num_tokens: int) -> None:
        """See `LoraBatch`; nothing is captured here."""
        self.slots = torch.full((num_tokens,), -1, dtype=torch.int32) if num_tokens else None


@dataclass(frozen=True, slots=True)
class _Adapter:
    a: torch.Tensor
    parts: list[tuple[torch.Tensor, int, int, float]]


class ReferenceLoraLinear:
    """The adapters of one layer, one after the other."""

    def __init__(self, batch: ReferenceLoraBatch, out_features: int) -> None:
        self._batch = batch
        self._out_features = out_features
        self._adapters: dict[int, _Adapter] = {}

    def set(
        self,
        slot: int,
        a: torch.Tensor,
        b: list[torch.Tensor],
        columns: list[int],
        widths: list[int],
        scales: list[float],
    ) -> None:
        """See `LoraLinear`."""
        self._adapters[slot] = _Adapter(a, list(zip(b, columns, widths, scales, strict=True)))

    def clear(self, slot: int) -> None:
        """See `LoraLinear`."""
        self._adapters.pop(slot, None)

    def add(self, x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See `LoraLinear`."""
        slots = self._batch.slots
        if slots is None:
            return
        if rows is not None:
            slots = slots[rows]
        for slot in sorted(set(slots.tolist()) & self._adapters.keys()):
            adapter = self._adapters[slot]
            own = (slots == slot).nonzero().flatten()
            shrunk = x[own].float() @ adapter.a.float()
            first = 0
            for b, column, width, scale in adapter.parts:
                rank = b.shape[1]
                outputs = b.transpose(0, 1).flatten(1)[:, :width].float()
                added = (shrunk[:, first : first + rank] * scale) @ outputs
                part = output[:, column : column + width]
                part[own] = (part[own].float() + added).to(output.dtype)
                first += rank


class ReferenceLora(KernelBackend):
    """Adapters of linear layers."""

    @override
    def lora_batch(self, limits: LoraLimits) -> LoraBatch:
        del limits
        return ReferenceLoraBatch()

    @override
    def lora_linear(self, batch: LoraBatch, in_features: int, out_features: int) -> LoraLinear:
        assert isinstance(batch, ReferenceLoraBatch)
        return ReferenceLoraLinear(batch, out_features)
