"""Mistral: Llama's shape with one sliding window for every layer (none where the checkpoint says null)."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def read_mistral(reader: ConfigReader) -> dict[str, Any]:
    """See `Family.read`."""
    positions = read_positions(reader, 131072)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        window=reader.optional_integer("sliding_window", 4096),
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader))
    return {"layers": (layer,) * read_num_layers(reader), "max_position_embeddings": positions}


MISTRAL = Family("mistral", "MistralForCausalLM", read_mistral)
