"""Gemma, Gemma 2 and the text model of Gemma 3: norms with weights around 0, scaled embeddings.

Gemma 2 and 3 have norms on both sides of attention and MLP. Gemma 2 slides in every other layer and caps scores and logits.
Gemma 3 slides in five layers of six, with positions of their own, and normalizes queries and keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    MAX_MULTIPLIER,
    Family,
    by_kind,
    read_attention,
    read_layer_types,
    read_mlp,
    read_norm,
    read_num_layers,
    read_positions,
)
from pagoda.models.layer_config import SANDWICH_NORM, AttentionConfig, LayerConfig
from pagoda.models.rope_config import read_rope_config, read_rope_of_layer_types


def _layer(reader: ConfigReader, *, default_cap: float | None, **attention: Any) -> LayerConfig:
    if reader.values.get("use_bidirectional_attention"):
        raise CheckpointError(f"{reader.where}: use_bidirectional_attention is not supported; supported: false")
    bias = reader.flag("attention_bias", False)
    scalar = reader.number("query_pre_attn_scalar", 256, high=MAX_MULTIPLIER)
    return LayerConfig(
        attention=read_attention(
            reader,
            num_kv_heads=4,
            head_dim=256,
            scale=scalar**-0.5,
            soft_cap=_cap(reader, "attn_logit_softcapping", default_cap),
            qkv_bias=bias,
            output_bias=bias,
            **attention,
        ),
        mlp=read_mlp(reader, activation_key="hidden_activation", activation="gelu_pytorch_tanh"),
        norms=SANDWICH_NORM,
    )


def _cap(reader: ConfigReader, key: str, default: float | None) -> float | None:
    return reader.optional_number(key, high=MAX_MULTIPLIER) if key in reader.values else default


def _read_gemma(reader: ConfigReader) -> dict[str, Any]:
    if reader.values.get("use_bidirectional_attention"):
        raise CheckpointError(f"{reader.where}: use_bidirectional_attention is not supported; supported: false")
    positions, bias = read_positions(reader, 8192), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=16,
        head_dim=256,
        rope=read_rope_config(reader, positions),
        qkv_bias=bias,
        output_bias=bias,
    )
    # The first checkpoints say gelu where they mean its approximation.
    named = reader.string("hidden_act", "gelu")
    mlp = read_mlp(reader) if named != "gelu" else read_mlp(reader, activation_key="", activation="gelu_pytorch_tanh")
    return {
        "layers": (LayerConfig(attention=attention, mlp=mlp),) * read_num_layers(reader),
        "max_position_embeddings": positions,
        **_common(reader, default_cap=None),
    }


def _common(reader: ConfigReader, *, default_cap: float | None) -> dict[str, Any]:
    return {
        "norm": read_norm(reader, 1e-6, float32_weight=True, offset=1.0),
        "embedding_multiplier": reader.integer("hidden_size") ** 0.5,
        "logit_soft_cap": _cap(reader, "final_logit_softcapping", default_cap),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


def _read_gemma2(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 8192)
    full = _layer(reader, rope=read_rope_config(reader, positions), default_cap=50.0)
    assert isinstance(full.attention, AttentionConfig)
    window = reader.optional_integer("sliding_window", 4096)
    kinds = {
        "full_attention": full,
        "sliding_attention": replace(full, attention=replace(full.attention, window=window)),
    }
    return {
        "layers": by_kind(read_layer_types(reader, lambda layer: bool((layer + 1) % 2)), kinds),
        "max_position_embeddings": positions,
        **_common(reader, default_cap=30.0),
    }


def _read_gemma3(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 131072)
    ropes = read_rope_of_layer_types(
        reader,
        positions,
        {"full_attention": 1e6, "sliding_attention": 1e4},
        local_theta_key="rope_local_base_freq",
    )
    full = _layer(reader, rope=ropes["full_attention"], qk_norm="head", default_cap=None)
    window = reader.optional_integer("sliding_window", 4096)
    assert isinstance(full.attention, AttentionConfig)
    sliding = replace(full.attention, rope=ropes["sliding_attention"], window=window)
    pattern = reader.integer("sliding_window_pattern", 6)
    return {
        "layers": by_kind(
            read_layer_types(reader, lambda layer: bool((layer + 1) % pattern)),
            {"full_attention": full, "sliding_attention": replace(full, attention=sliding)},
        ),
        "max_position_embeddings": positions,
        # The stretch by which the positions were trained is in max_position_embeddings already.
        "max_context_length": positions,
        **_common(reader, default_cap=None),
    }


# What config.json leaves out where it is as usual, of the sizes that every model has.
_USUAL_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
_BESIDE_TEXT_CONFIG = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")


def _text_config(reader: ConfigReader) -> ConfigReader:
    """The text model's part of the config of a model that sees images too; some keys may stand beside it."""
    beside = {key: reader.values[key] for key in _BESIDE_TEXT_CONFIG if key in reader.values}
    return ConfigReader({**_USUAL_SIZES, **beside, **reader.mapping("text_config")}, f"{reader.where}, text_config")


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3)
GEMMA3_WITH_VISION = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    _read_gemma3,
    names=CheckpointNames(
        renames=((r"^(model\.)?language_model\.(model\.)?", "model."), (r"^model\.lm_head\.", "lm_head.")),
        ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    ),
    language_model=_text_config,
)
