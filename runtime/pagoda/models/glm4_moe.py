"""GLM-4.5 to 4.7, and dots.llm1: a mixture of experts chosen by sigmoid scores with a correction, shared experts, the first
layers dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_norm, read_positions, read_windows
from pagoda.models.grouped_experts import read_dense_first, read_experts, read_routed_experts, read_router
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, num_experts = read_positions(reader, 131072), read_routed_experts(reader, 128)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=None,
        rope=read_rope_config(reader, positions, partial_rotary_factor=0.5),
        qk_norm="head" if reader.flag("use_qk_norm", False) else None,
        qkv_bias=reader.flag("attention_bias", False),
    )
    experts = read_experts(reader, read_router(reader, num_experts), num_experts, top_k=8, size=1408, num_shared=1)
    return {
        "layers": tuple(
            LayerConfig(attention=attention, mlp=mlp) for mlp in read_dense_first(reader, 1, read_mlp(reader), experts)
        ),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
    }


def _read_dots1(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 2048), reader.flag("attention_bias", False)
    num_experts, last = read_routed_experts(reader, None), reader.integer("max_window_layers", 62, low=0)
    attention = read_attention(
        reader,
        num_kv_heads=32,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
    router = read_router(reader, num_experts, normalize=False)
    experts = read_experts(reader, router, num_experts, top_k=None, size=1408, num_shared=0)
    windows = read_windows(reader, lambda layer: layer >= last)
    mlps = read_dense_first(reader, 0, read_mlp(reader), experts)
    return {
        "layers": tuple(
            LayerConfig(attention=replace(attention, window=window), mlp=mlp)
            for window, mlp in zip(windows, mlps, strict=True)
        ),
        "max_position_embeddings": positions,
    }


# Layers behind the last are for multi-token prediction.
GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read)
DOTS1 = Family("dots1", "Dots1ForCausalLM", _read_dots1)
