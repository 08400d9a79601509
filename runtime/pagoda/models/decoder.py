"""The decoder-only transformer that all supported families share; what differs between them is in `ModelConfig`."""

from __future__ import annotations

import torch
from torch import nn

from pagoda.models.config import ModelConfig
from pagoda.models.layers.attention import SelfAttention
from pagoda.models.layers.embedding import TokenEmbedding
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.layers.rope import build_rotary_embedding
from pagoda_kernels.attention import AttentionMetadata

KVCache = tuple[torch.Tensor, torch.Tensor]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, sliding_window: int | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn = SelfAttention(config, sliding_window, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype=dtype, device=device)

    def weight_targets(self, prefix: str) -> dict[str, torch.Tensor]:
        """Attention, MLP and both norms."""
        return {
            **self.input_layernorm.weight_targets(f"{prefix}input_layernorm."),
            **self.self_attn.weight_targets(f"{prefix}self_attn."),
            **self.post_attention_layernorm.weight_targets(f"{prefix}post_attention_layernorm."),
            **self.mlp.weight_targets(f"{prefix}mlp."),
        }

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer below's output and the residual stream under it, to this layer's; each [T, hidden_size].

        The output is not yet added to the stream: the next norm does that in the same pass.
        """
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, rotary, kv_cache, metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class DecoderForCausalLM(nn.Module):
    """Embedding, layers, final norm and language model head. Weights are allocated, not filled: see `models.loader`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.device = device
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.rotary_embedding = build_rotary_embedding(config.rope, config.head_dim, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, window, dtype=dtype, device=device) for window in config.layer_windows
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(
            config.hidden_size,
            {"lm_head": config.vocab_size},
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.embed_tokens.weight if config.tie_word_embeddings else None,
        )

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Every checkpoint tensor by name, with the view it is copied into; see `tied_weights` for those not listed."""
        targets = self.embed_tokens.weight_targets("model.embed_tokens.")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            targets.update(layer.weight_targets(f"model.layers.{index}."))
        targets.update(self.norm.weight_targets("model.norm."))
        if not self.config.tie_word_embeddings:
            targets.update(self.lm_head.weight_targets(""))
        return targets

    def tied_weights(self) -> dict[str, str]:
        """Tensors that a checkpoint may hold under a second name: that name, and the one in `weight_targets`."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One step for a ragged batch of T tokens.

        Args:
            input_ids, positions: int64 [T].
            kv_caches: one `(k, v)` a layer, each [num_blocks, num_kv_heads, block_size, head_dim]; written in place.
            metadata: which tokens belong together and where their keys and values are.

        Returns:
            Hidden states after the final norm, [T, hidden_size], for `compute_logits`.
        """
        rotary = self.rotary_embedding(positions)
        hidden = self.embed_tokens(input_ids)
        residual: torch.Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, rotary, kv_cache, metadata)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, hidden_size] of the positions to predict from, to logits, float32 [N, vocab_size]."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits.float()
