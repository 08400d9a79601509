"""Sizes of linear layers that end in the middle of panels, tiles and groups."""

from __future__ import annotations

import torch

SHAPES = [(1, 8), (32, 64), (70, 136), (129, 1040)]
ROWS = [1, 2, 6, 7, 13, 100]


def make_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features)
    return torch.randn(out_features, in_features, generator=generator).to(dtype)


def make_inputs(rows: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, in_features, generator=generator).to(dtype)
