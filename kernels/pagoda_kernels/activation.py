"""Gated activations."""

from __future__ import annotations

import torch

from pagoda_kernels import backend


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for x = [gate | up] of shape [T, 2 * size]; returns [T, size], contiguous."""
    return backend.active.silu_and_mul(x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up`, GELU in its tanh form, for x = [gate | up] of shape [T, 2 * size]; returns [T, size], contiguous."""
    return backend.active.gelu_and_mul(x)
