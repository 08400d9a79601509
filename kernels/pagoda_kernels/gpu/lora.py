"""Adapters on a GPU: whose rows are whose, where weights are, and the two launches of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.lora_kernels import lora_expand_kernel, lora_shrink_kernel
from pagoda_kernels.interface import KernelBackend, LoraBatch, LoraLinear
from pagoda_kernels.types import LORA_ALIGNMENT, PANEL, LoraLimits

# One size for any number of rows: with another, the order in which tensor cores add might be another, too.
TILE_M, TILE_N, TILE_R, TILE_K = 16, 64, 16, 64
# Inputs of a program: a decode step of few rows has as many programs as there are chunks.
CHUNK = 512
SHRINK_WARPS, EXPAND_WARPS, STAGES = 2, 4, 3

# Of an adapter's row in the table: address of A, its ranks, then of each fused layer address of B, rank, first rank, first
# column and columns. A slot that has nothing for the layer is all zeros.
MAX_PARTS, FIRST_PART, PART_FIELDS = 3, 2, 5
FIELDS = FIRST_PART + MAX_PARTS * PART_FIELDS


def num_blocks(num_tokens: int, num_slots: int) -> int:
    """The most blocks that so many tokens can make: each adapter may have one that is not full."""
    return -(-num_tokens // TILE_M) + min(num_slots, num_tokens)


class TritonLoraBatch:
    """The rows of a step, in tensors that never move."""

    def __init__(self, limits: LoraLimits) -> None:
        self.limits = limits
        self.num_tokens = 0  # 0: no row has an adapter
        self._most = num_blocks(limits.max_num_tokens, limits.num_slots)
        # int32: slot, first and last row of each block, then the tokens in the order of their adapters.
        self._table = torch.full((3 * self._most + limits.max_num_tokens,), -1, dtype=torch.int32, device=limits.device)
        self.blocks, self.order = self._table[: 3 * self._most], self._table[3 * self._most :]
        self.rank_stride = triton.cdiv(MAX_PARTS * limits.max_rank, LORA_ALIGNMENT) * LORA_ALIGNMENT

    def set(self, slots: torch.Tensor | None) -> None:
        """See `LoraBatch`."""
        self.num_tokens = 0 if slots is None else len(slots)
        if slots is None:
            return
        if len(slots) > self.limits.max_num_tokens:
            raise RuntimeError(f"{len(slots)} rows are more than max_num_tokens={self.limits.max_num_tokens}")
        of_token = slots.numpy()
        order = np.argsort(of_token, kind="stable")[np.count_nonzero(of_token < 0) :]
        table = np.full(3 * self._most + len(order), -1, dtype=np.int32)
        table[3 * self._most :] = order
        number = 0
        bounds = [*np.flatnonzero(np.diff(of_token[order], prepend=-1)).tolist(), len(order)]
        for first, end in pairwise(bounds):
            for row in range(first, end, TILE_M):
                table[3 * number : 3 * number + 3] = of_token[order[first]], row, min(row + TILE_M, end)
                number += 1
        written = torch.from_numpy(table)
        if self._table.is_cuda:
            written = written.pin_memory()
        self._table[: len(table)].copy_(written, non_blocking=True)

    def expect(self, num_tokens: int) -> None:
        """See `LoraBatch`."""
        self.num_tokens = num_tokens
        if num_tokens:
            self._table.fill_(-1)

    @property
    def num_blocks(self) -> int:
        """Blocks of the grid."""
        return num_blocks(self.num_tokens, self.limits.num_slots)


@dataclass(frozen=True, slots=True)
class _Held:
    """Keeps the weights of an adapter where the table says that they are."""

    a: torch.Tensor
    b: list[torch.Tensor]


class TritonLoraLinear:
    """The adapters of one layer."""

    def __init__(self, batch: TritonLoraBatch, in_features: int, out_features: int) -> None:
        limits = batch.limits
        self._batch = batch
        self._in_features, self._out_features = in_features, out_features
        self._adapters = torch.zeros((limits.num_slots, FIELDS), dtype=torch.int64, device=limits.device)
        self._scales = torch.zeros((limits.num_slots, MAX_PARTS), dtype=torch.float32, device=limits.device)
        self._held: dict[int, _Held] = {}

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
        limits = self._batch.limits
        self._check(slot, a, b, columns, widths)
        held = _Held(a.to(limits.device, limits.dtype), [each.to(limits.device, limits.dtype) for each in b])
        row = [held.a.data_ptr(), a.shape[1]]
        first = 0
        for each, column, width in zip(held.b, columns, widths, strict=True):
            row += [each.data_ptr(), each.shape[1], first, column, width]
            first += each.shape[1]
        row += [0] * (FIELDS - len(row))
        self._adapters[slot].copy_(torch.tensor(row, dtype=torch.int64))
        self._scales[slot].copy_(torch.tensor([*scales, *[0.0] * (MAX_PARTS - len(scales))]))
        self._held[slot] = held

    def clear(self, slot: int) -> None:
        """See `LoraLinear`."""
        if self._held.pop(slot, None) is not None:
            self._adapters[slot].zero_()

    def add(self, x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See `LoraLinear`."""
        batch = self._batch
        if not batch.num_tokens:
            return
        if rows is not None:
            raise RuntimeError("adapters of some rows of a step, as experts have them, are not implemented on a GPU")
        grid_blocks, num_chunks = batch.num_blocks, triton.cdiv(self._in_features, CHUNK)
        shrunk = torch.empty((len(x), num_chunks, batch.rank_stride), dtype=torch.float32, device=x.device)
        lora_shrink_kernel[(num_chunks * triton.cdiv(batch.rank_stride, TILE_R), grid_blocks)](
            shrunk,
            x,
            self._adapters,
            batch.blocks,
            batch.order,
            **shrink_constants(self._in_features, batch.rank_stride),
            num_warps=SHRINK_WARPS,
            num_stages=STAGES,
        )
        # Each fused layer may have one tile that is not full.
        lora_expand_kernel[(triton.cdiv(self._out_features, TILE_N) + MAX_PARTS - 1, grid_blocks)](
            output,
            shrunk,
            x,
            self._adapters,
            self._scales,
            batch.blocks,
            batch.order,
            **expand_constants(self._in_features, self._out_features, batch.rank_stride),
            num_warps=EXPAND_WARPS,
            num_stages=STAGES,
        )

    def _check(self, slot: int, a: torch.Tensor, b: list[torch.Tensor], columns: list[int], widths: list[int]) -> None:
        limits = self._batch.limits
        if not 0 <= slot < limits.num_slots:
            raise RuntimeError(f"slot {slot} of {limits.num_slots}")
        if not 0 < len(b) <= MAX_PARTS or len(b) != len(columns) or len(b) != len(widths):
            raise RuntimeError(f"{len(b)} parts, {len(columns)} columns and {len(widths)} widths; at most {MAX_PARTS}")
        if a.dim() != 2 or a.shape[0] != self._in_features or not 0 < a.shape[1] <= self._batch.rank_stride:
            raise RuntimeError(
                f"A is {list(a.shape)}; expected [{self._in_features}, at most {self._batch.rank_stride}]"
            )
        for each, column, width in zip(b, columns, widths, strict=True):
            if each.dim() != 3 or (each.shape[0], each.shape[2]) != (triton.cdiv(width, PANEL), PANEL):
                raise RuntimeError(f"B is {list(each.shape)}, not panels of {PANEL} for {width} outputs")
            if column < 0 or width <= 0 or column + width > self._out_features:
                raise RuntimeError(f"columns {column} to {column + width} of {self._out_features}")
        if sum(each.shape[1] for each in b) > a.shape[1]:
            raise RuntimeError("the ranks of all parts are more than A has")


def shrink_constants(in_features: int, rank_stride: int) -> dict[str, Any]:
    """Of `lora_shrink_kernel`."""
    return {
        "INPUTS": in_features,
        "CHUNK": CHUNK,
        "NUM_CHUNKS": triton.cdiv(in_features, CHUNK),
        "RANK_STRIDE": rank_stride,
        "FIELDS": FIELDS,
        "TILE_M": TILE_M,
        "TILE_R": TILE_R,
        "TILE_K": TILE_K,
    }


def expand_constants(in_features: int, out_features: int, rank_stride: int) -> dict[str, Any]:
    """Of `lora_expand_kernel`."""
    return {
        "OUTPUTS": out_features,
        "NUM_CHUNKS": triton.cdiv(in_features, CHUNK),
        "RANK_STRIDE": rank_stride,
        "FIELDS": FIELDS,
        "FIRST_PART": FIRST_PART,
        "PART_FIELDS": PART_FIELDS,
        "MAX_PARTS": MAX_PARTS,
        "PANEL": PANEL,
        "TILE_M": TILE_M,
        "TILE_N": TILE_N,
        "TILE_R": TILE_R,
    }


class TritonLora(KernelBackend):
    """Adapters of linear layers, for models whose weights are floats."""

    @override
    def lora_batch(self, limits: LoraLimits) -> LoraBatch:
        return TritonLoraBatch(limits)

    @override
    def lora_linear(self, batch: LoraBatch, in_features: int, out_features: int) -> LoraLinear:
        assert isinstance(batch, TritonLoraBatch)
        return TritonLoraLinear(batch, in_features, out_features)
