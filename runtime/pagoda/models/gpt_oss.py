"""gpt-oss: a mixture of experts in every layer, a sink for every head, a window in every other layer; experts in MXFP4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_names import CheckpointNames, StackedExperts
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    by_kind,
    read_attention,
    read_expert_size,
    read_layer_types,
    read_norm,
    read_num_experts,
    read_positions,
    read_top_k,
)
from pagoda.models.layer_config import LayerConfig, MoE, RouterConfig
from pagoda.models.rope_config import read_rope_config

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    for key, allowed in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if reader.number(key, allowed) != allowed:
            raise CheckpointError(f"{reader.where}: {key}={reader.number(key)} is not supported; supported: {allowed}")
    positions, bias = read_positions(reader, 131072), reader.flag("attention_bias", True)
    if not reader.mapping("rope_scaling") and not reader.mapping("rope_parameters"):
        reader = ConfigReader({**reader.values, "rope_scaling": _DEFAULT_ROPE}, reader.where)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=64,
        rope=read_rope_config(reader, positions, theta=150000.0),
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    num_experts = read_num_experts(reader, ("num_local_experts", "num_experts"), 128)
    experts = MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts, default=4),
        size=read_expert_size(reader, "intermediate_size", 2880),
        activation="clamped_swiglu",
        bias=True,
        router=RouterConfig(scoring="softmax_of_chosen", bias=True),
        router_name="router",
    )
    full = LayerConfig(attention=attention, mlp=experts)
    window = reader.optional_integer("sliding_window", 128)
    kinds = {"full_attention": full, "sliding_attention": replace(full, attention=replace(attention, window=window))}
    return {
        "layers": by_kind(read_layer_types(reader, lambda layer: bool((layer + 1) % 2)), kinds),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5, float32_weight=True),
    }


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read,
    names=CheckpointNames(
        stacked=(
            StackedExperts(name="gate_up_proj", members=("gate_proj", "up_proj"), interleaved=True, transposed=True),
            StackedExperts(name="down_proj", members=("down_proj",), transposed=True),
        )
    ),
)
