"""Root mean square normalization (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch

from pagoda_kernels import backend


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual stream, if there is one, and normalize the sum over its last dimension.

    Args:
        x: [..., size]; not changed.
        weight: [size].
        eps: added to the mean square.
        residual: shape and dtype of `x`; None at the bottom of the stack, where `x` itself is the stream.

    Returns:
        `(normed, new_residual)`: `new_residual = x + residual` in the dtype of `x` (`x` itself without a residual), and
        `normed` is it, normalized in float32, rounded to that dtype and then multiplied by `weight`.
    """
    return backend.active.rms_norm(x, weight, eps, residual)
