"""The compiled kernels as a backend. Importing this loads the library, which may have to be built first: see `build`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagoda_kernels.cpu.build import library
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    from pagoda_kernels.linear import PackedWeight
    from pagoda_kernels.step import StepTensors

torch.ops.load_library(str(library()))  # type: ignore[no-untyped-call]

_gather_step = torch.ops.pagoda_cpu.gather_step.default
_attention = torch.ops.pagoda_cpu.paged_attention.default
_rotate = torch.ops.pagoda_cpu.rotate_and_store.default
_norm = torch.ops.pagoda_cpu.rms_norm.default
_add_norm = torch.ops.pagoda_cpu.add_rms_norm.default
_linear = torch.ops.pagoda_cpu.linear.default
_linear_quantized = torch.ops.pagoda_cpu.linear_quantized.default
_packed_rows = torch.ops.pagoda_cpu.packed_rows.default
_choose_greedy = torch.ops.pagoda_cpu.choose_greedy.default
_pack_into = torch.ops.pagoda_cpu.pack.default


def available_levels() -> list[str]:
    """Names of the instruction sets that this processor can run the kernels with, slowest first."""
    levels: list[str] = torch.ops.pagoda_cpu.available_levels()
    return levels


def active_level() -> str:
    """The instruction set in use: the best available one, unless `use_level` has chosen another."""
    level: str = torch.ops.pagoda_cpu.active_level()
    return level


def use_level(level: str) -> None:
    """Let all kernels of this process use one of `available_levels`; `RuntimeError` for another."""
    torch.ops.pagoda_cpu.use_level(level)


def _gather(
    token_pool: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    max_query_len: int,
    into: StepTensors,
) -> None:
    _gather_step(
        token_pool,
        block_table,
        block_size,
        slots,
        query_start_loc,
        num_computed_tokens,
        into.input_ids,
        into.positions,
        into.slot_mapping,
        into.seq_lens,
        into.block_table,
    )


def _paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    kv_scales: tuple[float, float] | None = None,
) -> torch.Tensor:
    assert kv_scales is None, "float8 caches are for GPUs"
    attended: torch.Tensor = _attention(
        query,
        k_cache,
        v_cache,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table,
        scale,
        sliding_window or 0,
        soft_cap or 0.0,
    )
    return attended


def _rotate_and_store(
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
    assert kv_scales is None, "float8 caches are for GPUs"
    rotated: torch.Tensor = _rotate(
        query, key, value, cos, sin, query_norm, key_norm, eps, k_cache, v_cache, slot_mapping
    )
    return rotated


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return _norm(x, weight, eps), x
    normed, stream = _add_norm(x, residual, weight, eps)
    return normed, stream


def _packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    output: torch.Tensor
    if weight.scales is None:
        output = _linear(x, weight.values, bias, weight.out_features, out_dtype)
    else:
        output = _linear_quantized(
            x,
            weight.values,
            weight.scales,
            weight.zeros,
            bias,
            weight.out_features,
            weight.group_size,
            weight.bits == 4,
            out_dtype,
        )
    return output


def choose_greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pagoda_kernels.sampling.choose_greedy`."""
    token_ids, best_logits = _choose_greedy(logits)
    return token_ids, best_logits


def _rows(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows: torch.Tensor = _packed_rows(weight.values, ids, weight.out_features, dtype == torch.float32)
    return rows if rows.dtype == dtype else rows.to(dtype)


BACKEND = KernelBackend(
    name="cpu",
    gather_step=_gather,
    paged_attention=_paged_attention,
    write_kv=torch.ops.pagoda_cpu.write_kv.default,
    rotate_and_store=_rotate_and_store,
    rms_norm=_rms_norm,
    apply_rotary=torch.ops.pagoda_cpu.apply_rotary.default,
    silu_and_mul=torch.ops.pagoda_cpu.silu_and_mul.default,
    gelu_and_mul=torch.ops.pagoda_cpu.gelu_and_mul.default,
    packed_linear=_packed_linear,
    packed_rows=_rows,
    pack=_pack_into,
)
