"""The decoder-only transformer that all supported families share; what differs between them is in `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pagoda.models.config import ModelConfig
from pagoda.models.layers.attention import SelfAttention
from pagoda.models.layers.embedding import build_embedding
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.layers.rope import build_rotary_embedding
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.sharding import ModelShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import ParallelGroups, TensorParallelGroup
from pagoda_kernels.types import AttentionMetadata

KVCache = tuple[torch.Tensor, torch.Tensor]

# Embeddings, rotary cosines and sines, KV caches and metadata to hidden states after the final norm.
FusedForward = Callable[
    [torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[KVCache], AttentionMetadata], torch.Tensor
]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        shard: ModelShard,
        group: TensorParallelGroup,
        sliding_window: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn = SelfAttention(config, shard, group, sliding_window, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, shard, group, dtype=dtype, device=device)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
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
    """Embedding, layers, final norm and language model head; of these, what one rank holds.

    The first pipeline stage has the embedding, the last one norm and head, each its own run of layers. Weights are allocated,
    not filled: see `models.loading.loader`.
    """

    def __init__(
        self, config: ModelConfig, groups: ParallelGroups, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.dtype = dtype
        self.device = device
        self.shard = shard = ModelShard.of(config, groups.layout, groups.coordinates.rank)
        # Set by models.fused_layers where all layers and the final norm can run as one operator.
        self.fused_layers: FusedForward | None = None
        # Set by models.quantization.layers where linear layers are quantized.
        self.quantization: QuantizationConfig | None = None
        self.embed_tokens = self.norm = self.lm_head = None
        if shard.has_embedding:
            self.embed_tokens = build_embedding(
                shard.vocabulary, config.hidden_size, group=groups.tp_group, dtype=dtype, device=device
            )
        self.rotary_embedding = build_rotary_embedding(config.rope, config.head_dim, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, shard, groups.tp_group, config.layer_windows[layer], dtype=dtype, device=device)
            for layer in shard.layers
        )
        if shard.has_head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
            tied = config.tie_word_embeddings
            self.lm_head = Linear(
                Shard.whole(config.hidden_size),
                # A tied head on a stage without the embedding has a copy of its own, loaded from the same tensor.
                {"model.embed_tokens" if tied else "lm_head": shard.vocabulary},
                bias=False,
                dtype=dtype,
                device=device,
                weight=self.embed_tokens.weight if tied and self.embed_tokens is not None else None,
                # Two logits are often closer than half precision resolves.
                out_dtype=torch.float32,
            )

    def weight_targets(self) -> dict[str, WeightTarget]:
        """The checkpoint tensors of this rank by name, with the part it takes; see `tied_weights` for those not listed."""
        targets: dict[str, WeightTarget] = {}
        if self.embed_tokens is not None:
            targets.update(self.embed_tokens.weight_targets("model.embed_tokens."))
        for index, layer in zip(self.shard.layers, self.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            targets.update(layer.weight_targets(f"model.layers.{index}."))
        if self.norm is not None and self.lm_head is not None:
            targets.update(self.norm.weight_targets("model.norm."))
            if self.embed_tokens is None or not self.config.tie_word_embeddings:
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
    ) -> torch.Tensor | None:
        """One step for a ragged batch of T tokens.

        Args:
            input_ids, positions: int64 [T].
            kv_caches: one `(k, v)` for each layer held here, each [num_blocks, num_kv_heads, block_size, head_dim] with the
                KV heads held here; written in place.
            metadata: which tokens belong together and where their keys and values are.

        Returns:
            Hidden states after the final norm, [T, hidden_size], for `compute_logits`. None if this is not the last stage:
            it has sent the residual stream on.
        """
        rotary = self.rotary_embedding(positions)
        if self.embed_tokens is not None:
            hidden = self.embed_tokens(input_ids)
        else:
            shape = (len(input_ids), self.config.hidden_size)
            hidden = self.groups.recv_hidden_states(torch.empty(shape, dtype=self.dtype, device=self.device))
        if self.fused_layers is not None:
            return self.fused_layers(hidden, rotary, kv_caches, metadata)
        residual: torch.Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, rotary, kv_cache, metadata)
        if self.norm is None:
            # The next norm adds the two in this dtype before anything else: sent as one, half of the traffic.
            self.groups.send_hidden_states(hidden + residual)
            return None
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [N, hidden_size] of the positions to predict from, to logits, float32 [N, vocab_size].

        On the last stage only, and there by all ranks. Only tensor rank 0 gets the logits, the others None: it alone samples,
        so ranks can never disagree on a token, even if their devices round differently.
        """
        assert self.lm_head is not None, "this rank is not of the last stage"
        logits = self.groups.tp_group.gather(self.lm_head(hidden), dim=1)
        if logits is None:
            return None
        return logits[:, : self.config.vocab_size].contiguous()
