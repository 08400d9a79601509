"""Ministral 8B: Mistral's shape, where each layer says whether it slides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_positions, read_windows
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, mlp = read_positions(reader, 131072), read_mlp(reader)
    attention = read_attention(reader, num_kv_heads=8, head_dim=None, rope=read_rope_config(reader, positions))
    return {
        "layers": tuple(
            LayerConfig(attention=replace(attention, window=window), mlp=mlp)
            for window in read_windows(reader, lambda layer: True)
        ),
        "max_position_embeddings": positions,
    }


MINISTRAL = Family("ministral", "MinistralForCausalLM", _read)
