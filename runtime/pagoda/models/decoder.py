"""The decoder-only transformer that all supported families share; what differs between them is in `ModelConfig.layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from typing_extensions import override

from pagoda.models.causal_lm import CausalLM, KVCache
from pagoda.models.config import ModelConfig
from pagoda.models.layer_config import LayerConfig
from pagoda.models.layers.attention import build_attention
from pagoda.models.layers.builder import ChooseMethod, LayerBuilder, LinearKind, unquantized
from pagoda.models.layers.embedding import PackedEmbedding, build_embedding
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.moe import build_mlp
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.layers.rope import build_rotary_embedding
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.sharding import LayerShard, ModelShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda.parallel.groups import ParallelGroups
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


class FusedForward(Protocol):
    """All layers and the final norm as one operator."""

    def __call__(
        self,
        embedded: torch.Tensor,
        rotary: list[tuple[torch.Tensor, ...]],
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> torch.Tensor:
        """Embeddings [T, hidden_size] to hidden states after the final norm; the rest as in `DecoderForCausalLM.forward`."""

    def capture(self, layers: Sequence[int], output: torch.Tensor) -> None:
        """See `FusedDecoder.capture`."""


class AddToStream(nn.Module):
    """Where a layer has no norm before attention, or before its MLP: what was added to the stream is summed up there."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden_size] to the stream, twice: as the input and as the stream."""
        stream = x if residual is None else x + residual
        return stream, stream


class OutputNorm(nn.Module):
    """A norm of what attention or an MLP adds to the stream."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        normed: torch.Tensor = self.norm(x)[0]
        return normed


class Scaled(nn.Module):
    """A factor of what attention or an MLP adds to the stream (Granite)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] to the same shape."""
        return x * self.factor


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream, with the norms that `LayerConfig` names."""

    def __init__(
        self, config: LayerConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        norms = config.norms

        def before(name: str | None) -> nn.Module:
            return AddToStream() if name is None else build.rms_norm(hidden_size)

        def after(name: str | None) -> nn.Module:
            if name is not None:
                return OutputNorm(build.rms_norm(hidden_size))
            return nn.Identity() if config.residual_multiplier == 1.0 else Scaled(config.residual_multiplier)

        self.before_attention = before(norms.before_attention)
        self.self_attn = build_attention(
            config.attention, shard, hidden_size, build, f"{prefix}{config.attention.MODULE}."
        )
        self.after_attention = after(norms.after_attention)
        self.before_mlp = before(norms.before_mlp)
        self.mlp = build_mlp(config.mlp, shard, hidden_size, build, f"{prefix}mlp.")
        self.after_mlp = after(norms.after_mlp)

    def named_norms(self) -> dict[str, RMSNorm]:
        """The norms by their names in `LayerConfig`."""
        norms = self.config.norms
        places = {
            norms.before_attention: self.before_attention,
            norms.after_attention: self.after_attention,
            norms.before_mlp: self.before_mlp,
            norms.after_mlp: self.after_mlp,
        }
        found = {}
        for name, module in places.items():
            norm = module.norm if isinstance(module, OutputNorm) else module
            if name is not None and isinstance(norm, RMSNorm):
                found[name] = norm
        return found

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {
            **self.self_attn.weight_targets(f"{prefix}{self.config.attention.MODULE}."),
            **self.mlp.weight_targets(f"{prefix}mlp."),
        }
        for name, norm in self.named_norms().items():
            targets.update(norm.weight_targets(f"{prefix}{name}."))
        return targets

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer below's output and the residual stream under it, to this layer's; each [T, hidden_size].

        The output is not yet added to the stream: the next norm does that in the same pass.
        """
        hidden, residual = self.before_attention(hidden, residual)
        hidden = self.after_attention(self.self_attn(hidden, rotary, kv_cache, metadata))
        hidden, residual = self.before_mlp(hidden, residual)
        return self.after_mlp(self.feed_forward(hidden, residual)), residual

    def feed_forward(self, hidden: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """The MLP's output, for the stream [T, hidden_size] and what the norm before the MLP makes of it."""
        output: torch.Tensor = self.mlp(hidden)
        return output


class ParallelDecoderLayer(DecoderLayer):
    """Attention and MLP both read the stream behind one norm, and neither sees the other's output (Cohere)."""

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: tuple[torch.Tensor, ...],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DecoderLayer`."""
        hidden, residual = self.before_attention(hidden, residual)
        attended = self.after_attention(self.self_attn(hidden, rotary, kv_cache, metadata))
        return attended + self.after_mlp(self.mlp(hidden)), residual


def build_layer(
    config: LayerConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
) -> DecoderLayer:
    """The layer that `config` describes; `prefix`: the name of the module."""
    kind = ParallelDecoderLayer if config.parallel else DecoderLayer
    return kind(config, shard, hidden_size, build, prefix)


class DecoderForCausalLM(CausalLM):
    """Embedding, layers, final norm and language model head; of these, what one rank holds.

    The first pipeline stage has the embedding, the last one norm and head, each its own run of layers. Weights are allocated,
    not filled: see `models.loading.loader`. `choose_method` says how each linear layer keeps its weight, `longest` how long a
    context is going to be served at most (None: as long as the model can).
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ParallelGroups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        choose_method: ChooseMethod = unquantized,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.dtype = dtype
        self.device = device
        self.shard = shard = ModelShard.of(config, groups.layout, groups.coordinates.rank)
        # Set by the worker, where the model has several groups.
        self.layer_groups = [0] * len(shard.layers)
        # Set by models.fused_layers where all layers and the final norm can run as one operator.
        self.fused_layers: FusedForward | None = None
        # Set by models.build where linear layers are quantized.
        self.quantization: QuantizationConfig | None = None
        build = LayerBuilder(
            norm=config.norm, group=groups.tp_group, dtype=dtype, device=device, choose_method=choose_method
        )
        self.builder = build
        tied, hidden = config.tie_word_embeddings, Shard.whole(config.hidden_size)
        # A tied head on a stage without the embedding has a copy of its own, loaded from the same tensor.
        head_parts = {"model.embed_tokens" if tied else "lm_head": shard.vocabulary}
        head_method = choose_method("", hidden, head_parts, LinearKind(is_head=True)) if shard.has_head else None
        self.embed_tokens = self.norm = self.lm_head = None
        if shard.has_embedding:
            self.embed_tokens = build_embedding(
                shard.vocabulary,
                config.hidden_size,
                group=groups.tp_group,
                dtype=dtype,
                device=device,
                in_packed_head=tied and head_method is not None and head_method.comes_loaded,
            )
        # As transformers has it: the factor is a number of the model's dtype.
        self.embedding_multiplier = float(torch.tensor(config.embedding_multiplier, dtype=dtype))
        configs = [config.layers[index] for index in shard.layers]
        kinds = list(dict.fromkeys((layer.attention.rope, layer.attention.rope_head_dim) for layer in configs))
        self.rotary_embeddings = nn.ModuleList(
            build_rotary_embedding(rope, head_dim, device, longest=longest or config.max_context_length)
            for rope, head_dim in kinds
        )
        # For each layer held here, which of the embeddings is its own.
        self.rotary_of_layer = [kinds.index((layer.attention.rope, layer.attention.rope_head_dim)) for layer in configs]
        self.layers = nn.ModuleList(
            self.build_layer(config.layers[index], layer_shard, f"model.layers.{index}.")
            for index, layer_shard in zip(shard.layers, shard.layer_shards, strict=True)
        )
        if shard.has_head:
            self.norm = build.rms_norm(config.hidden_size)
            shares_weight = (
                tied and self.embed_tokens is not None and not isinstance(self.embed_tokens, PackedEmbedding)
            )
            self.lm_head = Linear(
                hidden,
                head_parts,
                bias=False,
                dtype=dtype,
                device=device,
                weight=self.embed_tokens.weight if shares_weight and self.embed_tokens is not None else None,
                # Two logits are often closer than half precision resolves.
                out_dtype=torch.float32,
                method=head_method,
            )

    def build_layer(self, config: LayerConfig, shard: LayerShard, prefix: str) -> DecoderLayer:
        """See `build_layer`."""
        return build_layer(config, shard, self.config.hidden_size, self.builder, prefix)

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

    @override
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> torch.Tensor | None:
        rotary = [embedding(positions) for embedding in self.rotary_embeddings]
        if self.embed_tokens is not None:
            hidden = self.embed_tokens(input_ids)
            if self.embedding_multiplier != 1.0:
                hidden = hidden * self.embedding_multiplier
        else:
            shape = (len(input_ids), self.config.hidden_size)
            hidden = self.groups.recv_hidden_states(torch.empty(shape, dtype=self.dtype, device=self.device))
        if self.fused_layers is not None:
            return self.fused_layers(hidden, rotary, kv_caches, metadata)
        hidden, residual = self.run_layers(input_ids, hidden, rotary, kv_caches, metadata)
        if self.norm is None:
            # The next norm adds the two in this dtype before anything else: sent as one, half of the traffic.
            self.groups.send_hidden_states(hidden if residual is None else hidden + residual)
            return None
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed

    def run_layers(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        rotary: list[tuple[torch.Tensor, ...]],
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the last layer held here adds to the stream, and the stream: see `DecoderLayer.forward`."""
        residual: torch.Tensor | None = None
        places = zip(self.layers, kv_caches, self.layer_groups, self.rotary_of_layer, strict=True)
        for layer, kv_cache, group, kind in places:
            hidden, residual = layer(hidden, residual, rotary[kind], kv_cache, metadata[group])
        return hidden, residual

    @override
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        assert self.lm_head is not None, "this rank is not of the last stage"
        logits = self.groups.tp_group.gather(self.lm_head(hidden), dim=1)
        if logits is None:
            return None
        return self._finish_logits(logits[:, : self.config.vocab_size].contiguous())

    def _finish_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Multiplier and soft cap, in place."""
        config = self.config
        if config.logit_multiplier != 1.0:
            logits.mul_(config.logit_multiplier)
        if config.logit_soft_cap is not None:
            backend.active.soft_cap(logits, config.logit_soft_cap)
        return logits
