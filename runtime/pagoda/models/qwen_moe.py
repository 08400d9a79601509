"""Qwen2-MoE and Qwen3-MoE: the dense models with a mixture of experts in their layers; Qwen2's has a shared expert, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    MAX_LAYERS,
    Family,
    read_activation,
    read_attention,
    read_expert_size,
    read_mlp,
    read_num_experts,
    read_num_layers,
    read_positions,
    read_top_k,
    read_windows,
)
from pagoda.models.layer_config import DenseMLP, LayerConfig, MoE, RouterConfig
from pagoda.models.rope_config import read_rope_config


def _read_qwen2_moe(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 32768)
    attention = read_attention(
        reader,
        num_kv_heads=16,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qkv_bias=reader.flag("qkv_bias", True),
    )
    mlps = read_qwen_mlps(
        reader,
        read_qwen_experts(
            reader,
            num_experts=60,
            top_k=4,
            size=1408,
            shared_size=read_expert_size(reader, "shared_expert_intermediate_size", 5632),
            shared_gate=True,
        ),
    )
    slides = reader.flag("use_sliding_window", False)
    last = reader.integer("max_window_layers", 28, low=0)
    windows: tuple[int | None, ...] = (None,) * len(mlps)
    if slides:
        windows = read_windows(reader, lambda layer: bool((layer + 1) % 2) and layer < last)
    return _model(positions, [replace(attention, window=window) for window in windows], mlps)


def _read_qwen3_moe(reader: ConfigReader) -> dict[str, Any]:
    positions, bias = read_positions(reader, 32768), reader.flag("attention_bias", False)
    attention = read_attention(
        reader,
        num_kv_heads=4,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        window=reader.optional_integer("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None,
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
    mlps = read_qwen_mlps(reader, read_qwen_experts(reader, num_experts=128, top_k=8, size=768))
    return _model(positions, [attention] * len(mlps), mlps)


def read_qwen_experts(
    reader: ConfigReader, *, num_experts: int, top_k: int, size: int, normalize: bool | None = None, **values: Any
) -> MoE:
    """The mixture, with the family's defaults; `normalize`: whatever `norm_topk_prob` says."""
    number = read_num_experts(reader, ("num_experts", "num_local_experts"), num_experts)
    return MoE(
        num_experts=number,
        top_k=read_top_k(reader, number, default=top_k),
        size=read_expert_size(reader, "moe_intermediate_size", size),
        activation=read_activation(reader),
        router=RouterConfig(normalize=reader.flag("norm_topk_prob", False) if normalize is None else normalize),
        **values,
    )


def read_qwen_mlps(reader: ConfigReader, experts: MoE) -> list[DenseMLP | MoE]:
    """Of each layer: experts in every `decoder_sparse_step`-th that is not among `mlp_only_layers`."""
    num_layers, step = read_num_layers(reader), reader.integer("decoder_sparse_step", 1)
    dense_layers = reader.values.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or not all(type(layer) is int for layer in dense_layers[:MAX_LAYERS]):
        raise reader.error("mlp_only_layers", "a list of layers")
    is_sparse = [layer not in dense_layers and (layer + 1) % step == 0 for layer in range(num_layers)]
    if all(is_sparse):
        return [experts] * num_layers
    dense = read_mlp(reader)
    return [experts if sparse else dense for sparse in is_sparse]


def _model(positions: int, attention: list[Any], mlps: list[DenseMLP | MoE]) -> dict[str, Any]:
    return {
        "layers": tuple(LayerConfig(attention=own, mlp=mlp) for own, mlp in zip(attention, mlps, strict=True)),
        "max_position_embeddings": positions,
    }


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe)
