"""Launching the gated delta net."""

from __future__ import annotations

from typing import Any

import torch
import triton
from typing_extensions import override

from pagoda_kernels.gpu.delta_net_kernels import (
    convolve_kernel,
    delta_rule_kernel,
    gated_norm_kernel,
    keep_inputs_kernel,
)
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights

CONV_TOKENS, CONV_TILE, CONV_WARPS = 16, 128, 4
KEEP_TILE, KEEP_WARPS = 256, 4
# Columns of a state in a program: with 128 keys, 32 numbers a thread.
STATE_TILE, STATE_WARPS = 32, 4
NORM_WARPS = 1


class TritonDeltaNet(KernelBackend):
    """Four launches, whose grids follow from the host's numbers alone: steps can be captured."""

    @override
    def gated_delta_net(
        self,
        projected: torch.Tensor,
        gates: torch.Tensor,
        weights: DeltaNetWeights,
        states: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        first_states, other_states, conv_states = states
        num_tokens, num_rows = len(projected), len(metadata.seq_lens)
        heads, value_dim = weights.num_value_heads, weights.value_dim
        taps, channels = conv_states.shape[1:]
        constants = shape_constants(weights)
        rows = (metadata.query_start_loc, metadata.seq_lens, metadata.block_table)
        table_stride, conv_stride = metadata.block_table.stride(0), conv_states.stride(0)
        paging = {"BLOCK_SIZE": metadata.block_size}
        mixed = torch.empty((num_tokens, channels), dtype=projected.dtype, device=projected.device)
        num_tiles = triton.cdiv(metadata.max_query_len, CONV_TOKENS)
        convolve_kernel[(num_rows * num_tiles, triton.cdiv(channels, CONV_TILE))](
            mixed,
            projected,
            weights.conv,
            conv_states,
            *rows,
            table_stride,
            conv_stride,
            num_tiles,
            **constants,
            **paging,
            TAPS=taps,
            TOKENS=CONV_TOKENS,
            TILE=CONV_TILE,
            num_warps=CONV_WARPS,
        )
        keep_inputs_kernel[(num_rows, triton.cdiv(channels, KEEP_TILE))](
            conv_states,
            projected,
            *rows,
            table_stride,
            conv_stride,
            **constants,
            **paging,
            TAPS=taps,
            TILE=KEEP_TILE,
            num_warps=KEEP_WARPS,
        )
        read = torch.empty((num_tokens, heads * value_dim), dtype=projected.dtype, device=projected.device)
        delta_rule_kernel[(num_rows, heads, triton.cdiv(value_dim, STATE_TILE))](
            read,
            mixed,
            gates,
            weights.decay_log,
            weights.step_bias,
            first_states,
            other_states,
            *rows,
            table_stride,
            first_states.stride(0),
            other_states.stride(0),
            weights.key_dim**-0.5,
            **constants,
            **paging,
            PADDED_KEY_DIM=triton.next_power_of_2(weights.key_dim),
            FIRST_HEADS=first_states.shape[1],
            TILE=STATE_TILE,
            num_warps=STATE_WARPS,
        )
        output = torch.empty_like(read)
        gated_norm_kernel[(num_tokens, heads)](
            output,
            read,
            projected,
            weights.norm,
            weights.eps,
            **constants,
            PADDED_VALUE_DIM=triton.next_power_of_2(value_dim),
            num_warps=NORM_WARPS,
        )
        return output


def shape_constants(weights: DeltaNetWeights) -> dict[str, Any]:
    """The constants that all four kernels have."""
    return {
        "KEY_HEADS": weights.num_key_heads,
        "GROUP": weights.num_value_heads // weights.num_key_heads,
        "KEY_DIM": weights.key_dim,
        "VALUE_DIM": weights.value_dim,
        "INTERLEAVED": weights.interleaved,
    }
