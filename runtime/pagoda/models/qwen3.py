"""Qwen3 (dense): queries and keys normalized per head, 128-wide heads unless the checkpoint says otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_layer_windows, read_mlp, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, mlp, bias = read_positions(reader, 32768), read_mlp(reader), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=32,
        head_dim=128,
        rope=read_rope_config(reader, positions),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
    return {
        "layers": tuple(
            LayerConfig(attention=replace(attention, window=window), mlp=mlp) for window in read_layer_windows(reader)
        ),
        "max_position_embeddings": positions,
    }


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read)
