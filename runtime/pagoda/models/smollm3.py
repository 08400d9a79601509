"""SmolLM3: Llama's shape, where every fourth layer knows no positions (NoPE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    read_attention,
    read_layer_types,
    read_mlp,
    read_num_layers,
    read_positions,
)
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 32768), reader.flag("attention_bias", False)
    has_rope = _layers_with_rope(reader)
    attention = read_attention(
        reader,
        num_kv_heads=4,
        head_dim=None,
        rope=read_rope_config(reader, positions, theta=2000000.0),
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = read_mlp(reader, bias=reader.flag("mlp_bias", False))
    slides = reader.flag("use_sliding_window", False)
    window = reader.optional_integer("sliding_window") if slides else None
    kinds = read_layer_types(reader, lambda layer: not has_rope[layer])
    layers = (
        replace(
            attention,
            rope=attention.rope if turned else None,
            window=window if kind == "sliding_attention" else None,
        )
        for turned, kind in zip(has_rope, kinds, strict=True)
    )
    return {
        "layers": tuple(LayerConfig(attention=layer, mlp=mlp) for layer in layers),
        "max_position_embeddings": positions,
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


def _layers_with_rope(reader: ConfigReader) -> tuple[bool, ...]:
    num_layers = read_num_layers(reader)
    given = reader.values.get("no_rope_layers")
    if given is None:
        interval = reader.integer("no_rope_layer_interval", 4)
        return tuple(bool((layer + 1) % interval) for layer in range(num_layers))
    if not isinstance(given, list) or not all(each in (0, 1) for each in given):
        raise reader.error("no_rope_layers", "a list of 0 and 1")
    if len(given) < num_layers:
        raise CheckpointError(
            f"{reader.where}: no_rope_layers has {len(given)} entries, num_hidden_layers is {num_layers}"
        )
    return tuple(map(bool, given[:num_layers]))


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read)
