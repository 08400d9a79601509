"""What one implementation of the kernels consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from pagoda_kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    from pagoda_kernels.linear import PackedWeight
    from pagoda_kernels.step import StepTensors


class GatherStep(Protocol):
    """See `pagoda_kernels.step.gather_step`."""

    def __call__(
        self,
        token_pool: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        slots: torch.Tensor,
        query_start_loc: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        max_query_len: int,
        into: StepTensors,
    ) -> None:
        """Gather."""


class PagedAttention(Protocol):
    """See `pagoda_kernels.attention.paged_attention`."""

    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        kv_scales: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """Attend."""


class WriteKV(Protocol):
    """See `pagoda_kernels.attention.write_kv`."""

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store."""


class RMSNorm(Protocol):
    """See `pagoda_kernels.norm.rms_norm`."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalize."""


class ApplyRotary(Protocol):
    """See `pagoda_kernels.rope.apply_rotary`."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate."""


class RotateAndStore(Protocol):
    """See `pagoda_kernels.attention.rotate_and_store`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        eps: float,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_scales: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """Rotate and store."""


class GeluAndMul(Protocol):
    """See `pagoda_kernels.activation.gelu_and_mul`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Activate."""


class SiluAndMul(Protocol):
    """See `pagoda_kernels.activation.silu_and_mul`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Activate."""


class PackedLinear(Protocol):
    """See `pagoda_kernels.linear.packed_linear`."""

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Multiply."""


class PackedRows(Protocol):
    """See `pagoda_kernels.linear.packed_rows`."""

    def __call__(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Look up."""


class Pack(Protocol):
    """See `pagoda_kernels.linear.pack_into`."""

    def __call__(self, weight: torch.Tensor, packed: torch.Tensor) -> None:
        """Write the rows of `weight`, contiguous, to the panels `packed` of the same dtype."""


@dataclass(frozen=True, slots=True)
class KernelBackend:
    """One implementation of every operation.

    A backend that brings only some of them starts from another one: `dataclasses.replace(reference.BACKEND, name=...,
    paged_attention=...)`. So there is always exactly one implementation behind each operation, and no test at call time.
    """

    name: str
    gather_step: GatherStep
    paged_attention: PagedAttention
    write_kv: WriteKV
    rotate_and_store: RotateAndStore
    rms_norm: RMSNorm
    apply_rotary: ApplyRotary
    silu_and_mul: SiluAndMul
    gelu_and_mul: GeluAndMul
    packed_linear: PackedLinear
    packed_rows: PackedRows
    pack: Pack
