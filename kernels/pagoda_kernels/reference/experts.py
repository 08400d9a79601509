"""Mixtures of experts, one expert after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import ExpertWeights


class ReferenceExperts(KernelBackend):
    """Each expert sees the rows that chose it."""

    @override
    def grouped_experts(
        self, x: torch.Tensor, routing_weights: torch.Tensor, ids: torch.Tensor, experts: ExpertWeights
    ) -> torch.Tensor:
        activate = (self.silu_and_mul, self.gelu_and_mul, self.clamped_swiglu_and_mul)[experts.activation]
        outputs = torch.zeros((*ids.shape, x.shape[1]), dtype=torch.float32, device=x.device)
        for index in range(experts.num_experts):
            tokens, choices = (ids == experts.first_expert + index).nonzero(as_tuple=True)
            bias = None if experts.gate_up_bias is None else experts.gate_up_bias[index]
            activated = activate(F.linear(x[tokens], experts.gate_up[index], bias))
            product = activated.float() @ experts.down[index].float().t()
            if experts.down_bias is not None:
                product += experts.down_bias[index]
            outputs[tokens, choices] = product
        total = outputs[:, 0] * routing_weights[:, :1]
        for choice in range(1, ids.shape[1]):
            total.addcmul_(outputs[:, choice], routing_weights[:, choice : choice + 1])
        return total
