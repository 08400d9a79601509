"""Qwen2 and Qwen2.5: biases on query, key and value, a sliding window on the upper layers if the checkpoint uses it."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_layer_windows, read_shape


def _read(reader: ConfigReader) -> dict[str, Any]:
    return {
        **read_shape(reader, num_kv_heads=32, head_dim=None, max_position_embeddings=32768),
        "qkv_bias": True,
        "layer_windows": read_layer_windows(reader),
    }


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read)
