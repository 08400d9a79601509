"""Mistral: Llama's shape with one sliding window for every layer (none where the checkpoint says null)."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_shape


def _read(reader: ConfigReader) -> dict[str, Any]:
    window = reader.optional_integer("sliding_window", 4096)
    return {
        **read_shape(reader, num_kv_heads=8, head_dim=None, max_position_embeddings=131072),
        "layer_windows": (window,) * reader.integer("num_hidden_layers"),
    }


MISTRAL = Family("mistral", "MistralForCausalLM", _read)
