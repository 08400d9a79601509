"""Qwen3-Next and Qwen3.5: three gated delta nets, then a layer of full attention with output gates; experts or a dense MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pagoda.models.checkpoint_names import CheckpointNames, StackedExperts
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    Family,
    by_kind,
    read_attention,
    read_expert_size,
    read_layer_types,
    read_mlp,
    read_norm,
    read_num_layers,
    read_positions,
)
from pagoda.models.layer_config import DeltaNetConfig, DenseMLP, LayerConfig, MoE
from pagoda.models.qwen_moe import read_qwen_experts, read_qwen_mlps
from pagoda.models.rope_config import read_rope_config

_FULL, _LINEAR = "full_attention", "linear_attention"
_MAX_CONV_SIZE = 64


def _read_layers(
    reader: ConfigReader, mlps: list[DenseMLP | MoE], *, num_kv_heads: int, interleaved: bool
) -> dict[str, Any]:
    positions = read_positions(reader, 32768)
    bias = reader.flag("attention_bias", False)
    full = read_attention(
        reader,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        rope=read_rope_config(reader, positions, partial_rotary_factor=0.25),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        output_gate=True,
    )
    linear = DeltaNetConfig(
        num_heads=reader.integer("linear_num_value_heads", 32, high=MAX_HEADS),
        num_kv_heads=reader.integer("linear_num_key_heads", 16, high=MAX_HEADS),
        head_dim=reader.integer("linear_key_head_dim", 128, high=MAX_HEAD_DIM),
        value_dim=reader.integer("linear_value_head_dim", 128, high=MAX_HEAD_DIM),
        conv_size=reader.integer("linear_conv_kernel_dim", 4, high=_MAX_CONV_SIZE),
        interleaved=interleaved,
    )
    interval = reader.integer("full_attention_interval", 4)
    kinds = read_layer_types(reader, lambda layer: bool((layer + 1) % interval), (_FULL, _LINEAR))
    attention = by_kind(kinds, {_FULL: full, _LINEAR: linear})
    return {
        "layers": tuple(LayerConfig(attention=own, mlp=mlp) for own, mlp in zip(attention, mlps, strict=True)),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-6, float32_weight=True, offset=1.0),
    }


def _experts(reader: ConfigReader, **defaults: Any) -> MoE:
    return read_qwen_experts(
        reader,
        shared_size=read_expert_size(reader, "shared_expert_intermediate_size", 512),
        shared_gate=True,
        **defaults,
    )


def _read_qwen3_next(reader: ConfigReader) -> dict[str, Any]:
    if reader.values.get("num_experts") == 0:
        mlps: list[DenseMLP | MoE] = [read_mlp(reader)] * read_num_layers(reader)
    else:
        normalize = reader.flag("norm_topk_prob", True)
        mlps = read_qwen_mlps(reader, _experts(reader, num_experts=512, top_k=10, size=512, normalize=normalize))
    return _read_layers(reader, mlps, num_kv_heads=2, interleaved=True)


def _read_qwen3_5(reader: ConfigReader) -> dict[str, Any]:
    mlps: list[DenseMLP | MoE] = [read_mlp(reader)] * read_num_layers(reader)
    return _read_layers(reader, mlps, num_kv_heads=4, interleaved=False)


def _read_qwen3_5_moe(reader: ConfigReader) -> dict[str, Any]:
    experts = _experts(reader, num_experts=256, top_k=8, size=512, normalize=True)
    mlps: list[DenseMLP | MoE] = [experts] * read_num_layers(reader)
    return _read_layers(reader, mlps, num_kv_heads=2, interleaved=False)


# Weights of the head that drafts (MTP), and of what sees images, belong to no layer here.
_IGNORED = (r"^mtp\.", r"^(model\.)?visual\.")
_BESIDE_TEXT_CONFIG = ("dtype", "torch_dtype", "eos_token_id", "quantization_config", "tie_word_embeddings")


def _text_config(reader: ConfigReader) -> ConfigReader:
    """The text model's part of the config of a model that sees images too; some keys may stand beside it."""
    beside = {key: reader.values[key] for key in _BESIDE_TEXT_CONFIG if key in reader.values}
    return ConfigReader({**beside, **reader.mapping("text_config")}, f"{reader.where}, text_config")


_NAMES = CheckpointNames(
    renames=((r"^(model\.)?language_model\.(model\.)?", "model."), (r"^model\.lm_head\.", "lm_head.")),
    fused=(("in_proj_qkv", ("in_proj_q", "in_proj_k", "in_proj_v")),),
    stacked=(
        StackedExperts(name="gate_up_proj", members=("gate_proj", "up_proj")),
        StackedExperts(name="down_proj", members=("down_proj",)),
    ),
    ignored=_IGNORED,
)


def _families(
    model_type: str, architecture: str, read: Callable[[ConfigReader], dict[str, Any]]
) -> tuple[Family, Family]:
    """The text model by itself, and as part of one that sees images."""
    text = Family(f"{model_type}_text", f"{architecture}ForCausalLM", read, names=_NAMES)
    return text, replace(
        text,
        model_type=model_type,
        architecture=f"{architecture}ForConditionalGeneration",
        language_model=_text_config,
    )


QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM", _read_qwen3_next, names=CheckpointNames(ignored=_IGNORED))
QWEN3_5, QWEN3_5_WITH_VISION = _families("qwen3_5", "Qwen3_5", _read_qwen3_5)
QWEN3_5_MOE, QWEN3_5_MOE_WITH_VISION = _families("qwen3_5_moe", "Qwen3_5Moe", _read_qwen3_5_moe)
