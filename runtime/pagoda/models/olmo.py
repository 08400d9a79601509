"""OLMoE, OLMo 2 and 3: queries and keys normalized over all heads. OLMo 2 and 3 have norms behind attention and MLP and none
before; OLMo 3 slides in three layers of four, and has longer positions in the others."""

from __future__ import annotations

from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    KINDS_OF_ATTENTION,
    Family,
    by_kind,
    read_activation,
    read_attention,
    read_expert_size,
    read_layer_types,
    read_mlp,
    read_norm,
    read_num_experts,
    read_num_layers,
    read_positions,
    read_top_k,
)
from pagoda.models.layer_config import POST_NORM, LayerConfig, MoE, RouterConfig
from pagoda.models.rope_config import RopeConfig, read_rope_config, read_rope_of_layer_types


def _layer(reader: ConfigReader, rope: RopeConfig, window: int | None = None) -> LayerConfig:
    bias = reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=rope,
        window=window,
        qk_norm="width",
        qkv_bias=bias,
        output_bias=bias,
    )
    return LayerConfig(attention=attention, mlp=read_mlp(reader), norms=POST_NORM)


def _read_olmo2(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 2048)
    layer = _layer(reader, read_rope_config(reader, positions))
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5, float32_weight=True),
    }


def _read_olmo3(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 2048)
    ropes = read_rope_of_layer_types(reader, positions, dict.fromkeys(KINDS_OF_ATTENTION, 500000.0))
    kinds = {
        "full_attention": _layer(reader, ropes["full_attention"]),
        "sliding_attention": _layer(
            reader, ropes["sliding_attention"], reader.optional_integer("sliding_window", 4096)
        ),
    }
    return {
        "layers": by_kind(read_layer_types(reader, lambda layer: bool((layer + 1) % 4)), kinds),
        "max_position_embeddings": positions,
        "max_context_length": ropes["full_attention"].max_context_length(positions),
        "norm": read_norm(reader, 1e-5, float32_weight=True),
    }


def _read_olmoe(reader: ConfigReader) -> dict[str, Any]:
    if reader.values.get("clip_qkv") is not None:
        raise CheckpointError(f"{reader.where}: clip_qkv is not supported; supported: null")
    positions, bias = read_positions(reader, 4096), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qk_norm="width",
        qkv_bias=bias,
        output_bias=bias,
    )
    num_experts = read_num_experts(reader, ("num_experts", "num_local_experts"), 64)
    experts = MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts, default=8),
        size=read_expert_size(reader, "intermediate_size", 2048),
        activation=read_activation(reader),
        router=RouterConfig(normalize=reader.flag("norm_topk_prob", False)),
    )
    return {
        "layers": (LayerConfig(attention=attention, mlp=experts),) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
    }


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read_olmoe)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read_olmo2)
OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _read_olmo3)
