"""Rotary position embedding (Su et al., 2021), in the layout of GPT-NeoX: a head's first half pairs with its second."""

from __future__ import annotations

import torch

from pagoda_kernels import backend


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their tokens' positions.

    Args:
        query: [T, num_heads, head_dim]; not changed, and may be a strided view.
        key: [T, num_kv_heads, head_dim]; likewise.
        cos, sin: float32 [T, head_dim // 2], one row a token (the model works them out once a step for all layers).

    Returns:
        The rotated query and key, contiguous, computed in float32 and rounded once.
    """
    return backend.active.apply_rotary(query, key, cos, sin)
