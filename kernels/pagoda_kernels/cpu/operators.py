"""Python's side of the compiled operators: the backend's functions, with the metadata taken apart."""

from __future__ import annotations

import torch

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.metadata import AttentionMetadata


def make_backend() -> KernelBackend:
    """The backend, once the library is loaded."""
    operators = torch.ops.pagoda_cpu
    run_attention = operators.paged_attention.default
    run_norm, run_add_norm = operators.rms_norm.default, operators.add_rms_norm.default

    def paged_attention(
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        attended: torch.Tensor = run_attention(
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

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return run_norm(x, weight, eps), x
        normed, stream = run_add_norm(x, residual, weight, eps)
        return normed, stream

    return KernelBackend(
        name="cpu",
        paged_attention=paged_attention,
        write_kv=operators.write_kv.default,
        rotate_and_store=operators.rotate_and_store.default,
        rms_norm=rms_norm,
        apply_rotary=operators.apply_rotary.default,
        silu_and_mul=operators.silu_and_mul.default,
        gelu_and_mul=operators.gelu_and_mul.default,
    )
