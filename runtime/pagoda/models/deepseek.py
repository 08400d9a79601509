"""DeepSeek V2 and V3 (of which shape R1, Moonlight and Kimi K2 are), and others with latent attention: GLM-4.7-Flash,
Mistral 4, MiniCPM3, Youtu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.checkpoint_names import STACKED_EXPERTS, CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    Family,
    read_mlp,
    read_multiplier,
    read_norm,
    read_num_layers,
    read_positions,
)
from pagoda.models.grouped_experts import read_dense_first, read_experts, read_routed_experts, read_router
from pagoda.models.layer_config import DenseMLP, LayerConfig, MLAConfig, MoE
from pagoda.models.rope_config import RopeConfig, read_rope_config, with_default_rope, with_query_scaling, yarn_mscale


def _read_v2(reader: ConfigReader) -> dict[str, Any]:
    _check_only(reader, "scoring_func", "softmax")
    if reader.flag("norm_topk_prob", False):
        # DeepSeek's own code divides the weights by their sum and does not scale them; transformers scales them alone.
        raise CheckpointError(f"{reader.where}: norm_topk_prob=true is not supported by this model; supported: false")
    method = reader.string("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"{reader.where}: topk_method {shown(method)} is not supported; supported: greedy, group_limited_greedy"
        )
    positions, num_experts = read_positions(reader, 2048), read_routed_experts(reader, 64)
    router = read_router(
        reader, num_experts, group_members=1, normalize=False, has_groups=method != "greedy", sigmoid=False
    )
    experts = read_experts(reader, router, num_experts, top_k=None, size=1407, num_shared=2)
    dense = read_mlp(reader, bias=reader.flag("mlp_bias", False))
    attention = _attention(reader, read_rope_config(reader, positions, interleaved=True))
    return _model(positions, attention, read_dense_first(reader, 0, dense, experts))


def _read_v3(reader: ConfigReader) -> dict[str, Any]:
    if reader.values.get("index_topk") is not None:
        raise CheckpointError(
            f"{reader.where}: index_topk (sparse attention) is not supported by this model; supported: null"
        )
    _check_only(reader, "scoring_func", "sigmoid")
    _check_only(reader, "topk_method", "noaux_tc")
    positions, num_experts = read_positions(reader, 4096), read_routed_experts(reader, 256)
    router = read_router(reader, num_experts, num_groups=8, top_groups=4, scaling=2.5)
    experts = read_experts(reader, router, num_experts, top_k=8, size=2048, num_shared=1)
    mlps = read_dense_first(reader, 3, read_mlp(reader), experts)
    return _model(positions, _attention(reader, _rope(reader, positions)), mlps)


def _read_glm_lite(reader: ConfigReader) -> dict[str, Any]:
    positions, num_experts = read_positions(reader, 202752), read_routed_experts(reader, 64)
    router = read_router(reader, num_experts, scaling=1.8)
    experts = read_experts(reader, router, num_experts, top_k=4, size=1536, num_shared=1)
    mlps = read_dense_first(reader, 1, read_mlp(reader), experts)
    if (kinds := reader.values.get("mlp_layer_types")) is not None:
        by_kind: dict[str, DenseMLP | MoE] = {"dense": read_mlp(reader), "sparse": experts}
        if not isinstance(kinds, list) or len(kinds) != len(mlps) or not all(kind in by_kind for kind in kinds):
            raise reader.error("mlp_layer_types", "a list of dense and sparse, one for each layer")
        mlps = [by_kind[kind] for kind in kinds]
    attention = _attention(reader, _rope(reader, positions), query_rank=768, nope_dim=192, value_dim=256)
    return {**_model(positions, attention, mlps), "norm": read_norm(reader, 1e-5)}


def read_mistral4(reader: ConfigReader) -> dict[str, Any]:
    """Experts chosen by a softmax; queries grow with positions beyond the original length."""
    reader = with_default_rope(
        reader,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    )
    positions, num_experts = read_positions(reader, 1048576), read_routed_experts(reader, 128)
    router = read_router(reader, num_experts, sigmoid=False)
    experts = read_experts(reader, router, num_experts, top_k=4, size=2048, num_shared=1)
    # What it says is the share of a whole query that is rotated.
    rope = replace(with_query_scaling(reader, _rope(reader, positions)), partial_rotary_factor=1.0)
    attention = _attention(reader, rope, query_rank=1024, kv_rank=256, nope_dim=64)
    return _model(positions, attention, read_dense_first(reader, 0, read_mlp(reader), experts))


def _read_minicpm3(reader: ConfigReader) -> dict[str, Any]:
    positions, num_layers = read_positions(reader, 32768), read_num_layers(reader)
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads", high=MAX_HEADS)
    rope = read_rope_config(reader, positions)
    attention = _attention(
        reader,
        rope,
        query_rank=768,
        kv_rank=256,
        nope_dim=64,
        rope_dim=32,
        value_dim=max(1, hidden_size // num_heads),
    )
    depth = read_multiplier(reader, "scale_depth", 1.4)
    layer = LayerConfig(
        attention=attention,
        mlp=read_mlp(reader, bias=reader.flag("mlp_bias", False)),
        residual_multiplier=depth / num_layers**0.5,
    )
    return {
        "layers": (layer,) * num_layers,
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
        "embedding_multiplier": read_multiplier(reader, "scale_emb", 12.0),
        "logit_multiplier": reader.integer("dim_model_base", 256) / hidden_size,
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


def _read_youtu(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 131072)
    mlps: list[DenseMLP | MoE] = [read_mlp(reader)] * read_num_layers(reader)
    return {
        **_model(positions, _attention(reader, _rope(reader, positions)), mlps),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


def _check_only(reader: ConfigReader, key: str, supported: str) -> None:
    found = reader.string(key, supported)
    if found != supported:
        raise CheckpointError(
            f"{reader.where}: {key} {shown(found)} is not supported by this model; supported: {supported}"
        )


def _rope(reader: ConfigReader, positions: int) -> RopeConfig:
    return read_rope_config(reader, positions, interleaved=reader.flag("rope_interleave", True))


def _attention(
    reader: ConfigReader,
    rope: RopeConfig,
    *,
    query_rank: int = 1536,
    kv_rank: int = 512,
    nope_dim: int = 128,
    rope_dim: int = 64,
    value_dim: int = 128,
) -> MLAConfig:
    nope_dim = reader.integer("qk_nope_head_dim", nope_dim, high=MAX_HEAD_DIM)
    rope_dim = reader.integer("qk_rope_head_dim", rope_dim, high=MAX_HEAD_DIM)
    # Where a rope is stretched, scores are sharpened by the square of what cosines and sines are not multiplied by.
    sharpened = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    return MLAConfig(
        num_heads=reader.integer("num_attention_heads", high=MAX_HEADS),
        query_rank=reader.optional_integer("q_lora_rank", query_rank, high=MAX_HIDDEN_SIZE),
        kv_rank=reader.integer("kv_lora_rank", kv_rank, high=MAX_HIDDEN_SIZE),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=reader.integer("v_head_dim", value_dim, high=MAX_HEAD_DIM),
        scale=(nope_dim + rope_dim) ** -0.5 * sharpened**2,
        rope=rope,
        bias=reader.flag("attention_bias", False),
    )


def _model(positions: int, attention: MLAConfig, mlps: list[DenseMLP | MoE]) -> dict[str, Any]:
    return {
        "layers": tuple(LayerConfig(attention=attention, mlp=mlp) for mlp in mlps),
        "max_position_embeddings": positions,
    }


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read_v2)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_v3)
GLM4_MOE_LITE = Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _read_glm_lite)
MISTRAL4 = Family("mistral4", "Mistral4ForCausalLM", read_mistral4, names=CheckpointNames(stacked=STACKED_EXPERTS))
MINICPM3 = Family("minicpm3", "MiniCPM3ForCausalLM", _read_minicpm3)
YOUTU = Family("youtu", "YoutuForCausalLM", _read_youtu)
