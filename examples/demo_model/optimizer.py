"""Muon for the matrices of the layers, AdamW for the rest; both behind one small object with one learning-rate factor."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

MUON_RATE, ADAM_RATE = 0.006, 6e-4
MOMENTUM, WEIGHT_DECAY = 0.95, 0.02


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices, about: quintic Newton-Schulz as in Muon (Jordan et al., 2024). [n, rows, columns]."""
    first, second, third = 3.4445, -4.7750, 2.0315
    flip = matrices.shape[1] > matrices.shape[2]
    result = matrices.transpose(1, 2) if flip else matrices
    result = result / (result.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = result @ result.transpose(1, 2)
        result = first * result + (second * square + third * square @ square) @ result
    return result.transpose(1, 2) if flip else result


class Optimizer:
    """Steps both optimizers. `factor` scales both learning rates."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.matrices: dict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
        others = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                self.matrices[tuple(parameter.shape)].append(parameter)
            else:
                others.append(parameter)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.matrices.items()
        }
        self.adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.parameters = list(model.parameters())

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """Clip, update, clear the gradients; returns the gradient's norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        for shape, group in self.matrices.items():
            gradients = torch.stack([parameter.grad for parameter in group])
            momentum = self.momenta[shape].lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonalise(gradients.lerp(momentum, MOMENTUM))
            rate = factor * MUON_RATE * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - factor * MUON_RATE * WEIGHT_DECAY).sub_(update, alpha=rate)
        for group in self.adam.param_groups:
            group["lr"] = factor * ADAM_RATE
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": list(self.momenta.values()), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for momentum, saved in zip(self.momenta.values(), state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
