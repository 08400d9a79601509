"""An EAGLE-3 head for training: plain torch, with the tensor names of SGLang's and vLLM's checkpoints.

Training-time test (Li et al., 2025, section 3): drafting is practised as it will be done. In round 0 position p reads the
model's hidden states of p; in round k the head's own, of k positions:

    round 0    query p sees keys of round 0 at 0 … p
    round k    query p sees keys of round 0 at 0 … p - k, then of round 1 at p - k + 1, … and of round k at p
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn


class Norm(nn.Module):
    """RMSNorm with a learnt scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["head_dim"]
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            size,
        )
        self.q_proj = nn.Linear(2 * hidden, self.num_heads * size, bias=False)
        self.k_proj = nn.Linear(2 * hidden, self.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(2 * hidden, self.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * size, hidden, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        rounds: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """`rounds`: keys and values `[batch, heads, length, head_dim]` of the rounds before; those of this one are added."""
        batch, length, _ = hidden.shape
        query = rotate(self.q_proj(hidden).view(batch, length, self.num_heads, -1).transpose(1, 2), rope)
        key = rotate(self.k_proj(hidden).view(batch, length, self.num_kv_heads, -1).transpose(1, 2), rope)
        value = self.v_proj(hidden).view(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        rounds.append((key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)))
        number, scale = len(rounds) - 1, self.head_dim**-0.5
        if number == 0:
            mixed = functional.scaled_dot_product_attention(query, *rounds[0], is_causal=True)
        else:
            places = torch.arange(length)
            visible = places[None, :] <= places[:, None] - number
            scores = [(query @ rounds[0][0].transpose(2, 3) * scale).masked_fill(~visible, float("-inf"))]
            shifted = [tuple(delayed(each, number - index) for each in pair) for index, pair in enumerate(rounds)]
            scores += [(query * keys).sum(-1, keepdim=True) * scale for keys, _ in shifted[1:]]
            shares = torch.cat(scores, dim=-1).float().softmax(-1).to(query.dtype)
            mixed = shares[..., :length] @ rounds[0][1]
            for index, (_, values) in enumerate(shifted[1:]):
                mixed = mixed + shares[..., length + index, None] * values
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.hidden_norm = Norm(hidden, eps), Norm(hidden, eps)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.self_attn, self.mlp = Attention(config), FeedForward(config)


class Head(nn.Module):
    """`config`: the target's config.json, with `draft_vocab_size`. `norm_before_residual` is true."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = Norm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, config["draft_vocab_size"], bias=False)
        self.rope_theta = config["rope_parameters"]["rope_theta"]

    def forward(self, states: torch.Tensor, embedded: torch.Tensor, num_rounds: int) -> list[torch.Tensor]:
        """Of every round its normed output `[batch, length, hidden_size]`, for `lm_head`.

        `states` `[batch, length, 3 * hidden_size]` of the model at positions 0 …, `embedded` the tokens at positions 1 ….
        """
        layer = self.midlayer
        features, tokens = self.fc(states), layer.input_layernorm(embedded)
        rope = angles(states.shape[1], layer.self_attn.head_dim, self.rope_theta, features.dtype)
        keys_and_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        outputs = []
        for _ in range(num_rounds):
            normed = layer.hidden_norm(features)
            hidden = normed + layer.self_attn(torch.cat((tokens, normed), -1), rope, keys_and_values)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            outputs.append(self.norm(hidden))
            features = delayed(hidden, 1)
        return outputs


def delayed(values: torch.Tensor, count: int) -> torch.Tensor:
    """Position p gets what p - `count` has; the first ones get zeros."""
    return functional.pad(values, (0, 0, count, 0))[..., : values.shape[-2], :] if count else values


def angles(length: int, size: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = theta ** -(torch.arange(0, size, 2).float() / size)
    turns = torch.arange(length).float()[:, None] * frequencies
    return turns.cos().to(dtype), turns.sin().to(dtype)


def rotate(heads: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
