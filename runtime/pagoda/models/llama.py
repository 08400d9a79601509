"""Llama 1 to 3.x, and the many models that took over its shape: no sliding window, biases only if the checkpoint says so."""

from __future__ import annotations

from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_shape


def _read(reader: ConfigReader) -> dict[str, Any]:
    attention_bias = reader.flag("attention_bias", False)
    return {
        **read_shape(reader, num_kv_heads=None, head_dim=None, max_position_embeddings=2048),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": reader.flag("mlp_bias", False),
        "layer_windows": (None,) * reader.integer("num_hidden_layers"),
    }


LLAMA = Family("llama", "LlamaForCausalLM", _read)
