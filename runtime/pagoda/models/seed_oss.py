"""Seed-OSS: Llama's shape, with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 524288)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=128,
        rope=read_rope_config(reader, positions),
        qkv_bias=reader.flag("attention_bias", True),
        output_bias=reader.flag("attention_out_bias", False),
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader, bias=reader.flag("mlp_bias", False)))
    return {"layers": (layer,) * read_num_layers(reader), "max_position_embeddings": positions}


SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", _read)
