"""The torch twin of every kernel: what the others are tested against, and what runs where nothing faster does."""

from __future__ import annotations

from pagoda_kernels.composed import compose_rotate_and_store
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference.activation import gelu_and_mul, silu_and_mul
from pagoda_kernels.reference.attention import paged_attention, write_kv
from pagoda_kernels.reference.linear import pack, packed_linear, packed_rows
from pagoda_kernels.reference.norm import rms_norm
from pagoda_kernels.reference.rope import apply_rotary
from pagoda_kernels.reference.step import gather_step

BACKEND = KernelBackend(
    name="reference",
    gather_step=gather_step,
    paged_attention=paged_attention,
    write_kv=write_kv,
    rotate_and_store=compose_rotate_and_store(rms_norm, apply_rotary, write_kv),
    rms_norm=rms_norm,
    apply_rotary=apply_rotary,
    silu_and_mul=silu_and_mul,
    gelu_and_mul=gelu_and_mul,
    packed_linear=packed_linear,
    packed_rows=packed_rows,
    pack=pack,
)
