"""Gemma 4's decoder: layers may have inputs of their own and a mixture of experts beside the MLP, and scale the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from pagoda.models.causal_lm import KVCache
from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.layer_config import LayerConfig, MoE, PerLayerInputs
from pagoda.models.layers.builder import LayerBuilder
from pagoda.models.layers.embedding import build_embedding
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.moe import MixtureOfExperts, Router
from pagoda.models.layers.norm import RMSNorm
from pagoda.models.sharding import LayerShard, Shard
from pagoda.models.weights import WeightTarget
from pagoda_kernels import backend
from pagoda_kernels.types import AttentionMetadata


class LayerInputs(nn.Module):
    """The numbers of a token that each layer gets, from its id and from its embedding."""

    def __init__(self, config: PerLayerInputs, num_layers: int, hidden_size: int, build: LayerBuilder) -> None:
        super().__init__()
        width = num_layers * config.size
        self.num_layers = num_layers
        vocabulary = Shard.even(config.vocab_size, build.group.rank, build.group.size)
        self.embed = build_embedding(vocabulary, width, group=build.group, dtype=build.dtype, device=build.device)
        parts = {"per_layer_model_projection": Shard.whole(width)}
        self.projection = build.linear("model.", Shard.whole(hidden_size), parts)
        self.norm = build.rms_norm(config.size)
        # As transformers has it: factors are numbers of the model's dtype.
        self.embedding_scale = float(torch.tensor(config.size**0.5, dtype=build.dtype))
        self.projection_scale = hidden_size**-0.5

    def weight_targets(self) -> dict[str, WeightTarget]:
        return {
            **self.embed.weight_targets("model.embed_tokens_per_layer."),
            **self.projection.weight_targets("model."),
            **self.norm.weight_targets("model.per_layer_projection_norm."),
        }

    def forward(self, input_ids: torch.Tensor, embedded: torch.Tensor) -> Sequence[torch.Tensor]:
        """int64 [T] and [T, hidden_size] to [T, size] for each layer."""
        shape = (len(input_ids), self.num_layers, -1)
        by_id = (self.embed(input_ids) * self.embedding_scale).view(shape)
        projected = (self.projection(embedded) * self.projection_scale).view(shape)
        inputs: torch.Tensor = (self.norm(projected)[0] + by_id) * 2**-0.5
        return inputs.unbind(1)


class ScaledRouter(Router):
    """Sees the stream normalized and scaled; weights are multiplied by a number of each expert."""

    def __init__(self, config: MoE, hidden_size: int, build: LayerBuilder, prefix: str) -> None:
        super().__init__(config, hidden_size, build, prefix)

        def vector(size: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=build.device), requires_grad=False)

        self.eps = build.norm.eps
        self.norm_weight = nn.Buffer(
            torch.ones(hidden_size, dtype=torch.float32, device=build.device), persistent=False
        )
        self.scale = vector(hidden_size, build.dtype)
        self.expert_scale = vector(config.num_experts, torch.float32)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **super().weight_targets(prefix),
            f"{prefix}router.scale": WeightTarget.whole(self.scale),
            f"{prefix}router.per_expert_scale": WeightTarget.whole(self.expert_scale),
        }

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Router`."""
        normed = backend.active.rms_norm(x, self.norm_weight, self.eps)[0]
        weights, ids = super().forward(normed * self.scale * x.shape[1] ** -0.5)
        return weights * self.expert_scale[ids], ids


class Gemma4Experts(MixtureOfExperts):
    """A mixture whose router sees another input than the experts."""

    def __init__(self, config: MoE, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str) -> None:
        super().__init__(config, shard, hidden_size, build, prefix)
        self.router = ScaledRouter(config, hidden_size, build, prefix)

    def mix(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What experts chosen by `stream` make of `x`, each [T, hidden_size]."""
        weights, ids = self.router(stream)
        return self.group.all_reduce(self._run_experts(x, weights, ids).to(x.dtype))


class Gemma4Layer(DecoderLayer):
    """A layer that ends by adding its own input, and scales the stream."""

    def __init__(
        self, config: LayerConfig, shard: LayerShard, hidden_size: int, build: LayerBuilder, prefix: str
    ) -> None:
        super().__init__(config, shard, hidden_size, build, prefix)
        self.scale = nn.Parameter(torch.empty(1, dtype=build.dtype, device=build.device), requires_grad=False)
        self.moe: Gemma4Experts | None = None
        if config.experts is not None:
            self.moe = Gemma4Experts(config.experts, shard, hidden_size, build, f"{prefix}moe.")
            self.expert_norms = nn.ModuleList(build.rms_norm(hidden_size) for _ in config.EXPERT_NORMS)
        self.gate: Linear | None = None
        if config.per_layer_input:
            hidden, size = Shard.whole(hidden_size), Shard.whole(config.per_layer_input)
            self.gate = build.linear(prefix, hidden, {"per_layer_input_gate": size})
            self.projection = build.linear(prefix, size, {"per_layer_projection": hidden})
            self.norm = build.rms_norm(hidden_size)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {**super().weight_targets(prefix), f"{prefix}layer_scalar": WeightTarget.whole(self.scale)}
        if self.gate is not None:
            targets |= self.gate.weight_targets(prefix)
            targets |= self.projection.weight_targets(prefix)
            targets |= self.norm.weight_targets(f"{prefix}post_per_layer_input_norm.")
        if self.moe is not None:
            targets |= self.moe.weight_targets(f"{prefix}moe.")
            for name, norm in zip(self.config.EXPERT_NORMS, self.expert_norms, strict=True):
                assert isinstance(norm, RMSNorm)
                targets |= norm.weight_targets(f"{prefix}{name}.")
        return targets

    @override
    def feed_forward(self, hidden: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(hidden)
        if self.moe is None:
            return output
        after_mlp, before, after = self.expert_norms
        mixed = after(self.moe.mix(stream, before(stream)[0]))[0]
        both: torch.Tensor = after_mlp(output)[0] + mixed
        return both

    def finish(self, stream: torch.Tensor, own_input: torch.Tensor | None) -> torch.Tensor:
        """The stream behind attention and MLP [T, hidden_size], and [T, per_layer_input], to the stream behind the layer."""
        if self.gate is not None and own_input is not None:
            gated = backend.active.gelu_and_mul(torch.cat((self.gate(stream), own_input), dim=1))
            stream = stream + self.norm(self.projection(gated))[0]
        return stream * self.scale


class Gemma4ForCausalLM(DecoderForCausalLM):
    """See `DecoderForCausalLM`; on one pipeline stage where layers have inputs of their own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.layer_inputs: LayerInputs | None = None
        config = self.config
        if config.per_layer_inputs is not None:
            self.layer_inputs = LayerInputs(
                config.per_layer_inputs, config.num_layers, config.hidden_size, self.builder
            )

    @override
    def build_layer(self, config: LayerConfig, shard: LayerShard, prefix: str) -> DecoderLayer:
        return Gemma4Layer(config, shard, self.config.hidden_size, self.builder, prefix)

    @override
    def weight_targets(self) -> dict[str, WeightTarget]:
        own = {} if self.layer_inputs is None else self.layer_inputs.weight_targets()
        return {**super().weight_targets(), **own}

    @override
    def run_layers(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        rotary: list[tuple[torch.Tensor, ...]],
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs: Sequence[torch.Tensor | None] = [None] * len(self.layers)
        if self.layer_inputs is not None:
            inputs = self.layer_inputs(input_ids, hidden)
        places = zip(self.layers, kv_caches, self.layer_groups, self.rotary_of_layer, inputs, strict=True)
        for layer, kv_cache, group, kind, own_input in places:
            assert isinstance(layer, Gemma4Layer)
            added, stream = layer(hidden, None, rotary[kind], kv_cache, metadata[group])
            hidden = layer.finish(added + stream, own_input)
        return hidden, None
