"""A single rank's stack of layers as one operator: no Python, and no torch dispatch, between two layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pagoda.models.causal_lm import KVCache
from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.layer_config import AttentionConfig
from pagoda.models.layers.attention import SelfAttention
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP
from pagoda.models.layers.moe import ACTIVATIONS, Expert, MixtureOfExperts
from pagoda.models.loading.packed import PackedLinearMethod
from pagoda_kernels import backend
from pagoda_kernels.interface import FusedDecoder, PackedLinear
from pagoda_kernels.types import AttentionMetadata


class FusedLayers:
    """All layers and the final norm of a model whose linear layers are packed; holds their weights, not the layers."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        assert model.norm is not None
        self._decoder: FusedDecoder = backend.active.fused_decoder(model.config.norm.eps, model.norm.weight.data)
        for layer, group, rotary in zip(model.layers, model.layer_groups, model.rotary_of_layer, strict=True):
            assert isinstance(layer, DecoderLayer)
            self._add_layer(layer, group, rotary)
        self._kv_caches: list[KVCache] | None = None
        self._k_caches: list[torch.Tensor] = []
        self._v_caches: list[torch.Tensor] = []

    def _add_layer(self, layer: DecoderLayer, group: int, rotary: int) -> None:
        attention, norms, places = layer.self_attn, layer.named_norms(), layer.config.norms
        assert isinstance(attention, SelfAttention)

        def weight_of(name: str | None) -> torch.Tensor | None:
            return None if name is None else norms[name].weight.data

        self._decoder.add_layer(
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            _parts_of(attention.qkv_proj),
            _parts_of(attention.o_proj),
            attention.scale,
            attention.soft_cap or 0.0,
            attention.sliding_window or 0,
            group,
            rotary,
            attention.interleaved,
        )
        self._decoder.set_norms(
            weight_of(places.before_attention),
            weight_of(places.after_attention),
            weight_of(places.before_mlp),
            weight_of(places.after_mlp),
            None if attention.q_norm is None else attention.q_norm.weight.data,
            None if attention.k_norm is None else attention.k_norm.weight.data,
            layer.config.residual_multiplier,
        )
        if attention.sinks is not None:
            self._decoder.set_sinks(attention.sinks.data)
        qkv_lora, output_lora = attention.qkv_proj.lora, attention.o_proj.lora
        if qkv_lora is not None and output_lora is not None:
            mlp = layer.mlp if isinstance(layer.mlp, GatedMLP) else None
            of_mlp = (None, None) if mlp is None else (mlp.gate_up_proj.lora, mlp.down_proj.lora)
            self._decoder.set_lora(qkv_lora, output_lora, *of_mlp)
        if isinstance(layer.mlp, GatedMLP):
            activation = ACTIVATIONS.index(layer.mlp.config.activation)
            self._decoder.set_mlp(_parts_of(layer.mlp.gate_up_proj), _parts_of(layer.mlp.down_proj), activation)
        elif layer.mlp.fused is not None:
            self._decoder.set_experts(layer.mlp.fused)

    def capture(self, layers: Sequence[int], output: torch.Tensor) -> None:
        """See `FusedDecoder.capture`."""
        self._decoder.capture(list(layers), output)

    def __call__(
        self,
        embedded: torch.Tensor,
        rotary: list[tuple[torch.Tensor, ...]],
        kv_caches: list[KVCache],
        metadata: Sequence[AttentionMetadata],
    ) -> torch.Tensor:
        """Embeddings [T, hidden_size] to hidden states after the final norm; the rest as in `DecoderForCausalLM.forward`."""
        if kv_caches is not self._kv_caches:
            self._kv_caches = kv_caches
            self._k_caches, self._v_caches = [k for k, _ in kv_caches], [v for _, v in kv_caches]
        return self._decoder.forward(
            embedded,
            [cos for cos, *_ in rotary],
            [sin for _, sin, *_ in rotary],
            self._k_caches,
            self._v_caches,
            metadata[0].query_start_loc,
            metadata[0].seq_lens,
            [of_group.block_table for of_group in metadata],
            [of_group.slot_mapping for of_group in metadata],
        )


def fuse_layers(model: DecoderForCausalLM) -> None:
    """Let `model` run its layers as one operator, where it can: on a single rank, all layers packed and of a kind that the
    operator has.

    This is the one place that decides between the two ways; where it cannot, the model keeps running layer by layer.
    """
    if backend.active.implements("fused_experts"):
        for module in model.modules():
            if isinstance(module, MixtureOfExperts) and not module.config.router.scaled_input:
                _fuse_experts(module)
    can_fuse = (
        backend.active.implements("fused_decoder")
        and model.groups.layout.world_size == 1
        and model.config.norm.kind == "rms"
        and all(_can_fuse(layer) for layer in model.layers)
    )
    model.fused_layers = FusedLayers(model) if can_fuse else None


_SCORINGS = ("softmax", "sigmoid", "softmax_of_chosen")


def _fuse_experts(moe: MixtureOfExperts) -> None:
    """Let a mixture whose layers are packed run as one operator, on any number of ranks."""
    if not _is_packed(moe):
        return
    config, router = moe.config, moe.router.config
    fused = backend.active.fused_experts(
        _parts_of(moe.router.linear),
        moe.router.correction_bias.data if moe.router.correction_bias is not None else None,
        config.top_k,
        _SCORINGS.index(router.scoring),
        router.normalize,
        router.scaling,
        router.num_groups,
        router.top_groups,
        router.group_members,
        ACTIVATIONS.index(config.activation),
    )
    for index, expert in enumerate(moe.experts):
        assert isinstance(expert, Expert)
        fused.add_expert(_parts_of(expert.gate_up_proj), _parts_of(expert.down_proj))
        if expert.gate_up_proj.lora is not None and expert.down_proj.lora is not None:
            fused.set_lora(index, expert.gate_up_proj.lora, expert.down_proj.lora)
    if moe.shared is not None:
        gate = None if moe.shared_gate is None else _parts_of(moe.shared_gate)
        fused.set_shared(_parts_of(moe.shared.gate_up_proj), _parts_of(moe.shared.down_proj), gate)
        if moe.shared.gate_up_proj.lora is not None and moe.shared.down_proj.lora is not None:
            fused.set_shared_lora(moe.shared.gate_up_proj.lora, moe.shared.down_proj.lora)
    fused.set_first_expert(moe.first_expert)
    fused.set_load(moe.load)
    moe.fused = fused


def _is_packed(module: nn.Module) -> bool:
    return all(isinstance(each.method, PackedLinearMethod) for each in module.modules() if isinstance(each, Linear))


def _can_fuse(layer: nn.Module) -> bool:
    """Whether the operator has what the layer is described by, and its weights are packed."""
    assert isinstance(layer, DecoderLayer)
    config = layer.config
    attention = config.attention
    if config.parallel or not isinstance(attention, AttentionConfig):
        return False
    if attention.value_norm or attention.keys_are_values or attention.kv_source is not None:
        return False
    if config.per_layer_input or config.output_scale or config.experts is not None:
        return False
    scales_queries = attention.rope is not None and attention.rope.query_scaling > 0
    return attention.qk_norm != "width" and not attention.output_gate and not scales_queries and _is_packed(layer)


def _parts_of(layer: Linear) -> PackedLinear:
    assert isinstance(layer.method, PackedLinearMethod)
    weight = layer.method.weight
    bias = None if layer.bias is None else layer.bias.data
    return (
        weight.values,
        bias,
        weight.scales,
        weight.zeros,
        weight.block_scales,
        weight.out_features,
        weight.group_size,
        weight.bits == 4,
    )
