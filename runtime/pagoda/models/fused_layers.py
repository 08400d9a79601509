"""A single rank's stack of layers as one operator: no Python, and no torch dispatch, between two layers."""

from __future__ import annotations

import torch

from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer, KVCache
from pagoda.models.layers.attention import SelfAttention
from pagoda.models.layers.linear import Linear
from pagoda.models.layers.mlp import GatedMLP
from pagoda.models.loading.packed import PackedLinearMethod
from pagoda_kernels import backend
from pagoda_kernels.interface import FusedDecoder, PackedLinear
from pagoda_kernels.types import AttentionMetadata


class FusedLayers:
    """All layers and the final norm of a model whose linear layers are packed; holds their weights, not the layers."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        assert model.norm is not None
        config = model.config
        self._decoder: FusedDecoder = backend.active.fused_decoder(
            model.shard.heads.size,
            model.shard.kv_heads.size,
            config.head_dim,
            model.shard.intermediate.size,
            config.rms_norm_eps,
            model.norm.weight.data,
        )
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            attention, mlp = layer.self_attn, layer.mlp
            self._decoder.add_layer(
                layer.input_layernorm.weight.data,
                layer.post_attention_layernorm.weight.data,
                attention.q_norm.weight.data if attention.q_norm is not None else None,
                attention.k_norm.weight.data if attention.k_norm is not None else None,
                _parts_of(attention.qkv_proj),
                _parts_of(attention.o_proj),
                _parts_of(mlp.gate_up_proj),
                _parts_of(mlp.down_proj),
                attention.sliding_window or 0,
            )
        self._kv_caches: list[KVCache] | None = None
        self._k_caches: list[torch.Tensor] = []
        self._v_caches: list[torch.Tensor] = []

    def __call__(
        self,
        embedded: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv_caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Embeddings [T, hidden_size] to hidden states after the final norm; the rest as in `DecoderForCausalLM.forward`."""
        if kv_caches is not self._kv_caches:
            self._kv_caches = kv_caches
            self._k_caches, self._v_caches = [k for k, _ in kv_caches], [v for _, v in kv_caches]
        return self._decoder.forward(
            embedded,
            *rotary,
            self._k_caches,
            self._v_caches,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            metadata.slot_mapping,
        )


def fuse_layers(model: DecoderForCausalLM) -> None:
    """Let `model` run its layers as one operator, where it can: on a single rank, all layers of the plain kind and packed.

    This is the one place that decides between the two ways; where it cannot, the model keeps running layer by layer.
    """
    can_fuse = (
        backend.active.implements("fused_decoder")
        and model.groups.layout.world_size == 1
        and model.config.hidden_act == "silu"
        and all(_is_plain(layer) for layer in model.layers)
    )
    model.fused_layers = FusedLayers(model) if can_fuse else None


def _is_plain(layer: torch.nn.Module) -> bool:
    if type(layer) is not DecoderLayer or type(layer.self_attn) is not SelfAttention or type(layer.mlp) is not GatedMLP:
        return False
    linears = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    return all(isinstance(linear.method, PackedLinearMethod) for linear in linears)


def _parts_of(layer: Linear) -> PackedLinear:
    assert isinstance(layer.method, PackedLinearMethod)
    weight = layer.method.weight
    bias = None if layer.bias is None else layer.bias.data
    return (
        weight.values,
        bias,
        weight.scales,
        weight.zeros,
        weight.out_features,
        weight.group_size,
        weight.bits == 4,
    )
