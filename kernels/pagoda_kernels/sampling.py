"""Choosing tokens from logits: one pass for the best, a few for a draw, never a sort. See `pagoda_kernels.gpu` and `.cpu`.

The torch twin is the sampler itself (`pagoda.sampling.selection`): the same tokens for the same seeds and positions.
"""

from __future__ import annotations

import torch


def choose_greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N], the lowest among equals, and the greatest logits float32 [N], of logits float32 [N, V].

    A row with a NaN has NaN as its greatest logit. On a GPU, or on a CPU where the backend is `cpu`.
    """
    if logits.device.type == "cpu":
        from pagoda_kernels.cpu import operators

        return operators.choose_greedy(logits)
    from pagoda_kernels.gpu import sampling

    return sampling.choose_greedy(logits)


def choose_open(
    logits: torch.Tensor,
    best_logits: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    inverse_temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """On a GPU: token ids int64 [R], a draw for each of `rows` among the tokens that min-p and top-p leave.

    Args:
        logits: float32 [N, V], with their greatest ones in `best_logits` float32 [N].
        rows: int64 [R], rows of the logits.
        seeds: int64 [R], the bits of unsigned seeds.
        positions: int64 [R], of the tokens to be chosen.
        inverse_temperature, min_p: float32 [R].
        top_p: float64 [R]; 1 or more for no top-p.
    """
    from pagoda_kernels.gpu import sampling

    return sampling.choose_open(logits, best_logits, rows, seeds, positions, inverse_temperature, min_p, top_p)
