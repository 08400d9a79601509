"""Granite 3 and the dense Granite 4, and Granite 3's mixtures of experts: Llama with multipliers of embeddings, residual
additions, scores and logits."""

from __future__ import annotations

from typing import Any

from pagoda.models.checkpoint_names import STACKED_EXPERTS, CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    MAX_INTERMEDIATE_SIZE,
    Family,
    read_activation,
    read_attention,
    read_expert_size,
    read_mlp,
    read_multiplier,
    read_num_experts,
    read_num_layers,
    read_positions,
    read_top_k,
)
from pagoda.models.layer_config import DenseMLP, LayerConfig, MoE, RouterConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    return _model(reader, read_mlp(reader, bias=reader.flag("mlp_bias", False)))


def _read_moe(reader: ConfigReader) -> dict[str, Any]:
    num_experts = read_num_experts(reader, ("num_local_experts", "num_experts"), 8)
    experts = MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts, default=2),
        size=read_expert_size(reader, "intermediate_size", 11008),
        activation=read_activation(reader),
        router=RouterConfig(scoring="softmax_of_chosen"),
        router_name="router",
        shared_size=reader.integer("shared_intermediate_size", 0, low=0, high=MAX_INTERMEDIATE_SIZE),
    )
    return _model(reader, experts)


def _model(reader: ConfigReader, mlp: DenseMLP | MoE) -> dict[str, Any]:
    positions, bias = read_positions(reader, 2048), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qkv_bias=bias,
        output_bias=bias,
        scale=read_multiplier(reader, "attention_multiplier", 1.0),
    )
    layer = LayerConfig(
        attention=attention, mlp=mlp, residual_multiplier=read_multiplier(reader, "residual_multiplier", 1.0)
    )
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "embedding_multiplier": read_multiplier(reader, "embedding_multiplier", 1.0),
        "logit_multiplier": 1.0 / read_multiplier(reader, "logits_scaling", 1.0),
    }


_MOE_NAMES = CheckpointNames(
    renames=(
        (r"\.block_sparse_moe\.router\.layer\.", ".mlp.router."),
        (r"\.block_sparse_moe\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.shared_mlp\.output_linear\.", ".mlp.shared_expert.down_proj."),
        (r"\.shared_mlp\.", ".mlp.shared_expert."),
    ),
    fused=(("input_linear", ("gate_proj", "up_proj")),),
    stacked=STACKED_EXPERTS,
)

GRANITE = Family("granite", "GraniteForCausalLM", _read)
GRANITE_MOE = Family("granitemoe", "GraniteMoeForCausalLM", _read_moe, names=_MOE_NAMES)
GRANITE_MOE_SHARED = Family("granitemoeshared", "GraniteMoeSharedForCausalLM", _read_moe, names=_MOE_NAMES)
