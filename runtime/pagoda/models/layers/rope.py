"""Rotary position embedding: from a token's position to the cosines and sines that turn its queries and keys.

The angles are worked out once a step from the positions, in float32, and shared by all layers; there is no table that
would bound the positions. Frequencies follow transformers' definition of each scaling type to the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pagoda.models.rope_config import RopeConfig, yarn_mscale


def build_rotary_embedding(
    rope: RopeConfig | None, head_dim: int, device: torch.device, *, longest: int | None = None
) -> RotaryEmbedding:
    """The embedding for `rope` over heads of `head_dim`; None: one that rotates nothing.

    `longest`: the longest context that the model will serve, by which longrope chooses its factors (None: longer than the
    original length). transformers chooses by the longest sequence of a batch and computes the cache anew where that grows
    beyond the original length; here, where requests share batches and caches, one choice holds for all, as in vLLM.
    """
    if rope is None:
        return RotaryEmbedding(torch.empty(0), 1.0, device)
    rotary_dim = rope.rotary_dim(head_dim)
    if rope.rope_type == "dynamic":
        return DynamicRotaryEmbedding(rope, rotary_dim, device)
    is_long = longest is None or longest > rope.original_max_position_embeddings
    frequencies = inverse_frequencies(rope, rotary_dim, is_long=is_long)
    if rope.query_scaling:
        return QueryScalingEmbedding(rope, frequencies, device)
    return RotaryEmbedding(frequencies, attention_scaling(rope), device, interleaved=rope.interleaved)


class RotaryEmbedding(nn.Module):
    """Angles `position * inverse_frequency`, for fixed frequencies."""

    def __init__(
        self, inverse_frequency: torch.Tensor, scaling: float, device: torch.device, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.inverse_frequency = nn.Buffer(inverse_frequency.to(device), persistent=False)
        self.scaling = scaling
        self.interleaved = interleaved

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """positions int64 [T] to `(cos, sin)`, each float32 [T, rotary_dim // 2], with yarn's attention scaling in them."""
        angles = positions.float().unsqueeze(1) * self._frequencies(positions)
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos.mul_(self.scaling), sin.mul_(self.scaling)
        return cos, sin

    def _frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        """Broadcastable to [T, rotary_dim // 2]."""
        return self.inverse_frequency


class QueryScalingEmbedding(RotaryEmbedding):
    """With a third tensor: what each token's rotated queries are multiplied by, float32 [T, 1, 1]."""

    def __init__(self, rope: RopeConfig, inverse_frequency: torch.Tensor, device: torch.device) -> None:
        super().__init__(inverse_frequency, attention_scaling(rope), device, interleaved=rope.interleaved)
        self.rope = rope

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in `RotaryEmbedding`."""
        whole_lengths = torch.floor(positions / self.rope.original_max_position_embeddings)
        scales = 1 + self.rope.query_scaling * torch.log(1 + whole_lengths)
        return (*super().forward(positions), scales.view(-1, 1, 1))


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Dynamic NTK scaling: the base grows with the context once that exceeds the original length.

    transformers takes the length of the whole batch at the time of the call, so that a key's angle depends on when it was
    computed and on who else was in the batch. Here it depends on the key's own position only: a token at position p is
    turned as if the context were p + 1 long. Up to the original length this equals transformers exactly, and beyond it
    equals what transformers does for each generated token; only a prompt that is itself longer than the original length is
    turned differently. In return, results are the same alone or batched, in chunks or at once, with a prefix hit or without.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        super().__init__(inverse_frequencies(rope, head_dim), 1.0, device, interleaved=rope.interleaved)
        self.rope = rope
        self.exponents = nn.Buffer(_exponents(head_dim).to(device), persistent=False)
        self.growth = head_dim / (head_dim - 2)

    def _frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        original = self.rope.original_max_position_embeddings
        lengths = (positions + 1).clamp(min=original).unsqueeze(1)
        stretch = (self.rope.factor * lengths / original) - (self.rope.factor - 1)
        stretched = 1.0 / ((self.rope.theta * stretch**self.growth) ** self.exponents)
        return torch.where(lengths > original, stretched, self.inverse_frequency)


def attention_scaling(rope: RopeConfig) -> float:
    """The factor of cosines and sines; 1 but for yarn (Peng et al., 2023, section 3.4) and longrope (Ding et al., 2024)."""
    if rope.rope_type == "longrope":
        if rope.attention_factor is not None:
            return rope.attention_factor
        stretched = max(1.0, rope.factor)
        return math.sqrt(1 + math.log(stretched) / math.log(rope.original_max_position_embeddings))
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, is_long: bool = True) -> torch.Tensor:
    """float32 [head_dim // 2] on the CPU, `head_dim` being the rotated dimensions; for `dynamic`, those up to the original
    length. `is_long`: which of longrope's factors count."""
    if rope.rope_type == "longrope":
        factors = torch.tensor(rope.long_factors if is_long else rope.short_factors, dtype=torch.float32)
        return 1.0 / (factors * rope.theta ** _exponents(head_dim))
    unscaled = 1.0 / (rope.theta ** _exponents(head_dim))
    if rope.rope_type == "proportional":
        num_turning = int(rope.partial_rotary_factor * head_dim // 2)
        unscaled[num_turning:] = 0.0
        return unscaled / rope.factor
    if rope.rope_type == "linear":
        return unscaled / rope.factor
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, unscaled)
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, head_dim)
    return unscaled


def _exponents(head_dim: int) -> torch.Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim


def _llama3_frequencies(rope: RopeConfig, unscaled: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, and those between are blended (Llama 3.1)."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / unscaled
    short, long = original / rope.high_freq_factor, original / rope.low_freq_factor
    kept_share = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept_share) * unscaled / rope.factor + kept_share * unscaled
    stretched = torch.where(wavelengths > long, unscaled / rope.factor, unscaled)
    return torch.where((wavelengths >= short) & (wavelengths <= long), blended, stretched)


def _yarn_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Dimensions that turn often are kept, slow ones stretched, with a linear ramp between ("NTK by parts")."""

    def dimension_of(rotations: float) -> float:
        periods = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(periods)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    wavelengths = rope.theta ** _exponents(head_dim)
    kept, stretched = 1.0 / wavelengths, 1.0 / (rope.factor * wavelengths)
    kept_share = 1 - ramp
    return stretched * (1 - kept_share) + kept * kept_share
