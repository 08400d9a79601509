"""Llama 1 to 3.x, and the many models that took over its shape: no sliding window, biases only if the checkpoint says so."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 2048), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qkv_bias=bias,
        output_bias=bias,
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader, bias=reader.flag("mlp_bias", False)))
    return {"layers": (layer,) * read_num_layers(reader), "max_position_embeddings": positions}


LLAMA = Family("llama", "LlamaForCausalLM", _read)
