"""The Triton kernels as a backend."""

from __future__ import annotations

import dataclasses

from pagoda_kernels import reference
from pagoda_kernels.gpu.attention import paged_attention
from pagoda_kernels.gpu.elementwise import gelu_and_mul, rms_norm, rotate_and_store, silu_and_mul
from pagoda_kernels.gpu.step import gather_step

# Rotation and KV write by themselves keep their torch twins: layers call `rotate_and_store`.
BACKEND = dataclasses.replace(
    reference.BACKEND,
    name="triton",
    gather_step=gather_step,
    paged_attention=paged_attention,
    rotate_and_store=rotate_and_store,
    rms_norm=rms_norm,
    silu_and_mul=silu_and_mul,
    gelu_and_mul=gelu_and_mul,
)
