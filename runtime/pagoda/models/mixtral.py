"""Mixtral: Mistral's attention and a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    read_activation,
    read_attention,
    read_expert_size,
    read_norm,
    read_num_experts,
    read_num_layers,
    read_positions,
    read_top_k,
)
from pagoda.models.layer_config import LayerConfig, MoE, RouterConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 131072)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=None,
        rope=read_rope_config(reader, positions, theta=1e6),
        window=reader.optional_integer("sliding_window", None),
    )
    num_experts = read_num_experts(reader, ("num_local_experts", "num_experts"), 8)
    experts = MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts, default=2),
        size=read_expert_size(reader, "intermediate_size", 14336),
        activation=read_activation(reader),
        router=RouterConfig(normalize=True),
    )
    layer = LayerConfig(attention=attention, mlp=experts)
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
    }


EXPERT_NAMES = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
)

MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read, names=CheckpointNames(renames=EXPERT_NAMES))
