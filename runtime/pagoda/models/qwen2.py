"""Qwen2 and Qwen2.5: biases on query, key and value, a sliding window on the upper layers if the checkpoint uses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_layer_windows, read_mlp, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, mlp = read_positions(reader, 32768), read_mlp(reader)
    attention = read_attention(
        reader, num_kv_heads=32, head_dim=None, rope=read_rope_config(reader, positions), qkv_bias=True
    )
    return {
        "layers": tuple(
            LayerConfig(attention=replace(attention, window=window), mlp=mlp) for window in read_layer_windows(reader)
        ),
        "max_position_embeddings": positions,
    }


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read)
