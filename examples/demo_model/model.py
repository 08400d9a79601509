"""The demo model for training: a Llama decoder in plain torch, with the parameter names of transformers' LlamaForCausalLM.

Only what training needs: no cache, no generation. `evaluate.py` and the export load the same weights into transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as functional
from torch import nn

OUTPUT_SCALE = 0.02


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the decoder, named as in a Llama `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048

    def to_dict(self) -> dict[str, int | float]:
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions. `hidden` is [batch, length, hidden_size]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        self.q_proj = nn.Linear(shape.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Embedding, layers, final norm. Named `model` inside DemoModel so that the weights match transformers' names."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class DemoModel(nn.Module):
    """The decoder with its output head tied to the embedding."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.register_buffer("rope", rope_table(shape), persistent=False)
        self.apply(initialise)

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states [batch, length, hidden_size] of `input_ids` int64 [batch, length]."""
        hidden = self.model.embed_tokens(input_ids)
        cos, sin = self.rope[0, : input_ids.shape[1]], self.rope[1, : input_ids.shape[1]]
        if torch.is_autocast_enabled(input_ids.device.type):
            dtype = torch.get_autocast_dtype(input_ids.device.type)
            hidden, cos, sin = hidden.to(dtype), cos.to(dtype), sin.to(dtype)
        for layer in self.model.layers:
            hidden = layer(hidden, cos, sin)
        return self.model.norm(hidden)

    def loss(self, input_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor):
        """Weighted mean cross-entropy over the trained positions only.

        `positions`, `targets` int64 [n] are flat indices into [batch * length] and the token to predict there; `weights`
        float32 [n] says how much each counts. Skipping the other positions saves most of the output head's work.
        """
        hidden = self.hidden(input_ids).flatten(0, 1).index_select(0, positions)
        logits = functional.linear(hidden, self.model.embed_tokens.weight).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()


def initialise(module: nn.Module) -> None:
    """Linear layers scaled by their fan-in, those that write to the residual stream small; embedding of norm about one."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    elif isinstance(module, DecoderLayer):  # visited after its parts
        with torch.no_grad():
            module.self_attn.o_proj.weight.mul_(OUTPUT_SCALE)
            module.mlp.down_proj.weight.mul_(OUTPUT_SCALE)


def rope_table(shape: ModelShape) -> torch.Tensor:
    """Cosines and sines, float32 [2, max_position_embeddings, head_dim]: the two halves of a head rotate together."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to `heads` [batch, heads, length, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
