"""Launching mixtures of experts."""

from __future__ import annotations

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.expert_kernels import combine_experts_kernel, expert_down_kernel, expert_gate_up_kernel
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import ExpertWeights

# One size for any number of rows: with another, the order in which tensor cores add might be another, too. Few rows an expert
# are bound by its weights, which a block of 64 rows reads once as one of 16 does.
TILE_M, TILE_K = 64, 64
EXPERT_WARPS, EXPERT_STAGES = 4, 3
COMBINE_TILE, COMBINE_WARPS = 1024, 4


def columns_of_tile(element_bytes: int) -> int:
    """Outputs of a program: in float32, which no tensor core multiplies, half as many fit its registers."""
    return 64 if element_bytes == 2 else 32


class TritonExperts(KernelBackend):
    """Token blocks by expert, two grouped products, and the weighted sum. Nothing waits for the host, grids follow from the
    number of tokens alone: steps can be captured."""

    @override
    def grouped_experts(
        self, x: torch.Tensor, routing_weights: torch.Tensor, ids: torch.Tensor, experts: ExpertWeights
    ) -> torch.Tensor:
        num_tokens, hidden_size = x.shape
        top_k, num_experts, size = ids.shape[1], experts.num_experts, experts.size
        if not num_experts:  # of a rank that more ranks than experts leave without
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        num_pairs = num_tokens * top_k
        order, expert_of_block, first_block, first_row = _sort(ids, experts.first_expert, num_experts)
        num_blocks, tile_n = len(expert_of_block), columns_of_tile(x.element_size())
        activated = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
        options = {"num_warps": EXPERT_WARPS, "num_stages": EXPERT_STAGES}
        gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
        expert_gate_up_kernel[(triton.cdiv(size, tile_n), num_blocks)](
            activated,
            x,
            experts.gate_up,
            x if gate_up_bias is None else gate_up_bias,
            order,
            expert_of_block,
            first_block,
            first_row,
            x.stride(0),
            top_k,
            hidden_size,
            size,
            experts.activation,
            gate_up_bias is not None,
            TILE_M,
            tile_n,
            TILE_K,
            **options,
        )
        products = torch.empty((num_pairs, hidden_size), dtype=torch.float32, device=x.device)
        expert_down_kernel[(triton.cdiv(hidden_size, tile_n), num_blocks)](
            products,
            activated,
            experts.down,
            x if down_bias is None else down_bias,
            order,
            expert_of_block,
            first_block,
            first_row,
            size,
            hidden_size,
            down_bias is not None,
            TILE_M,
            tile_n,
            TILE_K,
            **options,
        )
        output = torch.empty((num_tokens, hidden_size), dtype=torch.float32, device=x.device)
        combine_experts_kernel[(num_tokens, triton.cdiv(hidden_size, COMBINE_TILE))](
            output,
            products,
            ids,
            routing_weights,
            experts.first_expert,
            num_experts,
            top_k,
            hidden_size,
            COMBINE_TILE,
            num_warps=COMBINE_WARPS,
        )
        return output


def _sort(
    ids: torch.Tensor, first_expert: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs by expert, and how they are cut into blocks; pairs of other ranks' experts come last, in no block.

    int64 [pairs]: the sorted pairs. int32 [blocks]: of each block its expert, -1 for one that is not used. int32: the first
    block of each expert [experts], and the first row [experts + 1].
    """
    own = ids.flatten() - first_expert
    own = torch.where((own >= 0) & (own < num_experts), own, num_experts)
    order = own.argsort(stable=True)
    counts = own.new_zeros(num_experts + 1).scatter_add_(0, own, torch.ones_like(own))[:num_experts]
    blocks = (counts + (TILE_M - 1)) // TILE_M
    end_block = blocks.cumsum(0)
    # Each expert may have one block that is not full, but not more of them than there are pairs.
    most = triton.cdiv(len(own), TILE_M) + min(num_experts, len(own))
    number = torch.arange(most, device=ids.device)
    expert_of_block = torch.searchsorted(end_block, number, right=True)
    expert_of_block = torch.where(number < end_block[-1], expert_of_block, -1)
    first_row = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return order, expert_of_block.int(), (end_block - blocks).int(), first_row.int()
