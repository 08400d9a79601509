"""Qwen3 (dense): queries and keys normalized per head, 128-wide heads unless the checkpoint says otherwise."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_layer_windows, read_shape


def _read(reader: ConfigReader) -> dict[str, Any]:
    attention_bias = reader.flag("attention_bias", False)
    return {
        **read_shape(reader, num_kv_heads=32, head_dim=128, max_position_embeddings=32768),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": True,
        "layer_windows": read_layer_windows(reader),
    }


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read)
