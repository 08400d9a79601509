"""The gated delta net, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights

DeltaNetStates = tuple[torch.Tensor, ...]


class ReferenceDeltaNet(KernelBackend):
    """The recurrent form, in float32."""

    @override
    def gated_delta_net(
        self,
        projected: torch.Tensor,
        gates: torch.Tensor,
        weights: DeltaNetWeights,
        states: DeltaNetStates,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        mixed, output_gate = _split(projected, weights)
        beta, log_decay = _gates(gates, weights)
        read = torch.empty_like(output_gate)
        ends = metadata.query_start_loc.tolist()
        for row, length in enumerate(metadata.seq_lens.tolist()):
            tokens = slice(ends[row], ends[row + 1])
            table = metadata.block_table[row].tolist()
            first = length - (tokens.stop - tokens.start)
            _run_row(
                mixed[tokens],
                beta[tokens],
                log_decay[tokens],
                weights,
                states,
                table,
                first,
                metadata.block_size,
                read[tokens],
            )
        # As transformers rounds: unit norm, product with the weight, product with the gate.
        unit = F.rms_norm(read.float(), (weights.value_dim,), eps=weights.eps).to(read.dtype)
        weighted = (unit.float() * weights.norm).to(read.dtype)
        return (weighted.float() * F.silu(output_gate.float())).to(read.dtype).flatten(1)


def _split(projected: torch.Tensor, weights: DeltaNetWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, keys and values [T, channels], and output gates [T, num_value_heads, value_dim]."""
    key_dim, value_dim, num_key_heads = weights.key_dim, weights.value_dim, weights.num_key_heads
    values = weights.num_value_heads * value_dim
    sizes = [num_key_heads * key_dim, num_key_heads * key_dim, values, values]
    if weights.interleaved:
        by_head = projected.view(len(projected), num_key_heads, -1)
        parts = [part.flatten(1) for part in torch.split(by_head, [size // num_key_heads for size in sizes], dim=2)]
    else:
        parts = list(torch.split(projected, sizes, dim=1))
    return torch.cat(parts[:3], dim=1), parts[3].reshape(len(projected), -1, value_dim)


def _gates(gates: torch.Tensor, weights: DeltaNetWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of a value is written, and the logarithm of what is kept, each [T, num_value_heads]."""
    if weights.interleaved:
        by_head = gates.view(len(gates), weights.num_key_heads, 2, -1)
        write, step = by_head[:, :, 0].flatten(1), by_head[:, :, 1].flatten(1)
    else:
        write, step = gates.chunk(2, dim=1)
    return write.sigmoid(), -weights.decay_log.exp() * F.softplus(step + weights.step_bias)


def _run_row(
    mixed: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    weights: DeltaNetWeights,
    states: DeltaNetStates,
    table: list[int],
    first: int,
    block_size: int,
    read: torch.Tensor,
) -> None:
    """The tokens of one row, from position `first` on; `read` [tokens, num_value_heads, value_dim] is written."""
    *matrices, convs = states
    num_first = matrices[0].shape[1]
    taps, channels = convs.shape[1:]
    shape = (weights.num_value_heads, weights.key_dim, weights.value_dim)
    if first == 0:
        state, history = (
            mixed.new_zeros(shape, dtype=torch.float32),
            mixed.new_zeros((taps, channels), dtype=torch.float32),
        )
    else:
        block = table[(first - 1) // block_size]
        state, history = torch.cat((matrices[0][block], matrices[1][block])), convs[block]
    inputs = torch.cat((history, mixed.float()))
    convolved = sum(inputs[tap : tap + len(mixed)] * weights.conv[tap] for tap in range(taps + 1))
    assert isinstance(convolved, torch.Tensor)
    convolved = F.silu(convolved.to(mixed.dtype)).float()
    keys_size = weights.num_key_heads * weights.key_dim
    query, key, value = torch.split(convolved, [keys_size, keys_size, channels - 2 * keys_size], dim=1)
    group = weights.num_value_heads // weights.num_key_heads
    query, key = (
        _unit(part.reshape(len(part), -1, weights.key_dim)).repeat_interleave(group, dim=1) for part in (query, key)
    )
    query, value = query * weights.key_dim**-0.5, value.reshape(len(value), -1, weights.value_dim)
    for token in range(len(mixed)):
        state = state * log_decay[token].exp()[:, None, None]
        recalled = (state * key[token].unsqueeze(2)).sum(dim=1)
        change = (value[token] - recalled) * beta[token].unsqueeze(1)
        state = state + key[token].unsqueeze(2) * change.unsqueeze(1)
        read[token] = (state * query[token].unsqueeze(2)).sum(dim=1)
        position = first + token
        if token == len(mixed) - 1 or (position + 1) % block_size == 0:
            block = table[position // block_size]
            matrices[0][block], matrices[1][block] = state[:num_first], state[num_first:]
            convs[block] = inputs[token + 1 : token + 1 + taps]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()
