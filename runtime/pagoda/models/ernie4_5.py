"""ERNIE 4.5 (dense): Llama's shape, rotated in pairs of neighbours, with biases everywhere or nowhere."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_norm, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 131072), reader.flag("use_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=2,
        head_dim=128,
        rope=read_rope_config(reader, positions, theta=500000.0, interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader, bias=bias))
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


ERNIE4_5 = Family("ernie4_5", "Ernie4_5ForCausalLM", _read)
