"""Cohere (Command R, Aya) and Cohere 2 (Command R7B, Command A): attention and MLP side by side behind one LayerNorm, scaled
logits, rotation in pairs of neighbours; in Cohere 2 where a layer slides, and none where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    by_kind,
    read_attention,
    read_layer_types,
    read_mlp,
    read_multiplier,
    read_num_layers,
    read_positions,
)
from pagoda.models.layer_config import BlockNorms, LayerConfig, NormConfig
from pagoda.models.rope_config import read_rope_config

_ONE_NORM = BlockNorms(before_attention="input_layernorm")


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 8192), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=read_rope_config(reader, positions, interleaved=True),
        window=reader.optional_integer("sliding_window", 4096),
        qkv_bias=bias,
        output_bias=bias,
    )
    sliding = LayerConfig(
        attention=attention,
        mlp=read_mlp(reader),
        norms=_ONE_NORM,
        parallel=True,
    )
    # transformers rotates where there is a window.
    full = replace(sliding, attention=replace(attention, rope=None, window=None))
    pattern = reader.integer("sliding_window_pattern", 4)
    kinds = read_layer_types(reader, lambda layer: bool((layer + 1) % pattern))
    return {
        "layers": by_kind(kinds, {"full_attention": full, "sliding_attention": sliding}),
        "max_position_embeddings": positions,
        "max_context_length": positions,
        **_model(reader),
    }


def _read_cohere(reader: ConfigReader) -> dict[str, Any]:
    if reader.flag("use_qk_norm", False):
        raise CheckpointError(f"{reader.where}: use_qk_norm=true is not supported by this model; supported: false")
    positions, bias = read_positions(reader, 8192), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        rope=read_rope_config(reader, positions, theta=500000.0, interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader), norms=_ONE_NORM, parallel=True)
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        **_model(reader),
    }


def _model(reader: ConfigReader) -> dict[str, Any]:
    return {
        "norm": NormConfig(kind="layer", eps=reader.number("layer_norm_eps", 1e-5, high=1.0), float32_weight=True),
        "logit_multiplier": read_multiplier(reader, "logit_scale", 0.0625),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


COHERE = Family("cohere", "CohereForCausalLM", _read_cohere)
COHERE2 = Family("cohere2", "Cohere2ForCausalLM", _read)
