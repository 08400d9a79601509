"""MiniMax M2: a mixture of experts chosen by sigmoid scores with a correction, queries and keys normalized over all heads,
half of each head rotated."""

from __future__ import annotations

from typing import Any

from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    read_activation,
    read_attention,
    read_expert_size,
    read_num_experts,
    read_num_layers,
    read_positions,
    read_top_k,
)
from pagoda.models.layer_config import LayerConfig, MoE, RouterConfig
from pagoda.models.mixtral import EXPERT_NAMES
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, head_dim = read_positions(reader, 196608), reader.integer("head_dim", 128)
    share = min(1.0, reader.integer("rotary_dim", head_dim) / head_dim)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=128,
        rope=read_rope_config(reader, positions, theta=5e6, partial_rotary_factor=share),
        qk_norm="width",
    )
    num_experts = read_num_experts(reader, ("num_local_experts", "num_experts"), 256)
    experts = MoE(
        num_experts=num_experts,
        top_k=read_top_k(reader, num_experts, default=8),
        size=read_expert_size(reader, "intermediate_size", 1536),
        activation=read_activation(reader),
        router=RouterConfig(scoring="sigmoid", normalize=True, correction_bias=True),
    )
    layer = LayerConfig(attention=attention, mlp=experts)
    return {"layers": (layer,) * read_num_layers(reader), "max_position_embeddings": positions}


MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    _read,
    names=CheckpointNames(
        renames=(*EXPERT_NAMES, (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"))
    ),
)
