"""Encoders in torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from typing_extensions import override

from pagoda_kernels.interface import Encoder, KernelBackend, PackedLinear
from pagoda_kernels.reference.elementwise import rotate
from pagoda_kernels.reference.linear import ReferenceLinear
from pagoda_kernels.types import PackedWeight

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_LINEAR = ReferenceLinear()


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return x
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), bias, self.eps).to(self.weight.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Norm
    mlp_norm: _Norm
    qkv: PackedLinear
    output: PackedLinear
    up: PackedLinear
    down: PackedLinear
    window: int
    rotary: int


class TorchEncoder(Encoder):
    """Row after row, by `scaled_dot_product_attention`."""

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, *, norm_first: bool, gated: bool, activation: str
    ) -> None:
        self._num_heads = num_heads
        self._head_dim = head_dim
        self._eps = eps
        self._norm_first = norm_first
        self._gated = gated
        self._activate = _ACTIVATIONS[activation]
        self._relative_bias: torch.Tensor | None = None
        self._final_norm = _Norm(None, None, eps)
        self._layers: list[_Layer] = []

    def set_embedding(
        self,
        words: torch.Tensor,
        positions: torch.Tensor | None,
        types: torch.Tensor | None,
        norm: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
    ) -> None:
        self._words, self._positions, self._types = words, positions, types
        self._embedding_norm = _Norm(norm, norm_bias, self._eps)

    def set_relative_bias(self, bias: torch.Tensor) -> None:
        self._relative_bias = bias

    def set_final_norm(self, norm: torch.Tensor, norm_bias: torch.Tensor | None) -> None:
        self._final_norm = _Norm(norm, norm_bias, self._eps)

    def add_layer(
        self,
        attention_norm: torch.Tensor | None,
        attention_norm_bias: torch.Tensor | None,
        mlp_norm: torch.Tensor | None,
        mlp_norm_bias: torch.Tensor | None,
        qkv: PackedLinear,
        output: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        window: int,
        rotary: int,
    ) -> None:
        self._layers.append(
            _Layer(
                _Norm(attention_norm, attention_norm_bias, self._eps),
                _Norm(mlp_norm, mlp_norm_bias, self._eps),
                qkv,
                output,
                up,
                down,
                window,
                rotary,
            )
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        type_ids: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        cosines: Sequence[torch.Tensor],
        sines: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        starts = query_start_loc.tolist()
        stream = F.embedding(input_ids, self._words).float()
        if self._types is not None:
            stream = stream + F.embedding(torch.zeros_like(input_ids) if type_ids is None else type_ids, self._types)
        if self._positions is not None:
            stream = stream + F.embedding(positions, self._positions)
        stream = self._embedding_norm(stream.to(self._words.dtype))
        for layer in self._layers:
            angles = None if layer.rotary < 0 else (cosines[layer.rotary], sines[layer.rotary])
            if self._norm_first:
                stream = stream + self._attention(layer, layer.attention_norm(stream), starts, angles)
                stream = stream + self._mlp(layer, layer.mlp_norm(stream))
            else:
                stream = layer.attention_norm(stream + self._attention(layer, stream, starts, angles))
                stream = layer.mlp_norm(stream + self._mlp(layer, stream))
        return self._final_norm(stream)

    def _attention(
        self,
        layer: _Layer,
        x: torch.Tensor,
        starts: list[int],
        angles: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        heads = _multiply(x, layer.qkv).view(len(x), 3, self._num_heads, self._head_dim)
        query, key, value = heads.unbind(dim=1)
        if angles is not None:
            cos, sin = (each.unsqueeze(1) for each in angles)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = torch.empty_like(query)
        for begin, end in pairwise(starts):
            mask = self._mask(end - begin, layer.window, x)
            q, k, v = (each[begin:end].transpose(0, 1).unsqueeze(0) for each in (query, key, value))
            attended[begin:end] = F.scaled_dot_product_attention(q, k, v, mask).squeeze(0).transpose(0, 1)
        return _multiply(attended.flatten(1), layer.output)

    def _mask(self, length: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
        """What is added to scores, [1, heads or 1, queries, keys]."""
        if not window and self._relative_bias is None:
            return None
        place = torch.arange(length, device=like.device)
        distance = place - place[:, None]
        mask = torch.zeros((1, 1, length, length), dtype=like.dtype, device=like.device)
        if self._relative_bias is not None:
            farthest = self._relative_bias.shape[1] // 2
            mask = self._relative_bias[:, distance.clamp(-farthest, farthest) + farthest].unsqueeze(0).to(like.dtype)
        return mask.masked_fill(distance.abs() > window, -torch.inf) if window else mask

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        up = _multiply(x, layer.up)
        if self._gated:
            first, second = up.chunk(2, dim=-1)
            return _multiply(self._activate(first) * second, layer.down)
        return _multiply(self._activate(up), layer.down)


class ReferenceEncoder(KernelBackend):
    """The encoder of this backend."""

    @override
    def encoder(
        self,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        eps: float,
        *,
        norm_first: bool,
        gated: bool,
        activation: str,
    ) -> Encoder:
        del intermediate_size
        return TorchEncoder(num_heads, head_dim, eps, norm_first=norm_first, gated=gated, activation=activation)


def _multiply(x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    values, bias, scales, zeros, block_scales, out_features, group_size, has_four_bits = linear
    if values.dim() == 2:
        return F.linear(x, values, bias)
    bits = 8 * values.element_size() if scales is None else 4 if has_four_bits else 8
    weight = PackedWeight(values, out_features, x.shape[1], scales, zeros, group_size, bits, block_scales)
    return _LINEAR.packed_linear(x, weight, bias)
