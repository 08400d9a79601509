"""The text model of Gemma 4: wider heads where a layer sees everything, normalized values, which may be the keys; the last
layers may read what earlier ones keep, and each layer may have inputs of its own."""

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
    MAX_MULTIPLIER,
    MAX_VOCAB_SIZE,
    Family,
    read_activation,
    read_attention,
    read_expert_size,
    read_layer_types,
    read_mlp,
    read_norm,
    read_num_experts,
    read_positions,
)
from pagoda.models.layer_config import SANDWICH_NORM, AttentionConfig, LayerConfig, MoE, PerLayerInputs, RouterConfig
from pagoda.models.rope_config import read_rope_of_layer_types, with_default_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
_PATTERN = 6
_ROPES = {
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    if reader.values.get("use_bidirectional_attention") == "all":
        raise CheckpointError(
            f"{reader.where}: use_bidirectional_attention=all is not supported; supported: null, vision"
        )
    reader = with_default_rope(reader, _ROPES)
    positions = read_positions(reader, 131072)
    kinds = read_layer_types(reader, lambda layer: bool((layer + 1) % _PATTERN))
    # The last layer sees everything, whatever config.json says.
    kinds = (*kinds[:-1], _FULL)
    attention = _attention_of_kinds(reader, positions)
    num_own = len(kinds) - reader.integer("num_kv_shared_layers", 0, low=0, high=len(kinds) - 1)
    inputs = reader.integer("hidden_size_per_layer_input", 256, low=0, high=MAX_HIDDEN_SIZE)
    mlp = read_mlp(reader, activation_key="hidden_activation", activation="gelu_pytorch_tanh")
    experts = _experts(reader) if reader.flag("enable_moe_block", False) else None
    wide = replace(mlp, size=2 * mlp.size) if reader.flag("use_double_wide_mlp", False) else mlp
    layers = []
    for index, kind in enumerate(kinds):
        source = None if index < num_own else _last_of(kinds[:num_own], kind, reader)
        layers.append(
            LayerConfig(
                attention=replace(attention[kind], kv_source=source),
                mlp=mlp if source is None else wide,
                norms=SANDWICH_NORM,
                per_layer_input=inputs,
                output_scale=True,
                experts=experts,
            )
        )
    per_layer = PerLayerInputs(
        vocab_size=reader.integer("vocab_size_per_layer_input", 262144, high=MAX_VOCAB_SIZE), size=inputs
    )
    return {
        "layers": tuple(layers),
        "max_position_embeddings": positions,
        "max_context_length": positions,
        "norm": read_norm(reader, 1e-6, float32_weight=True),
        "embedding_multiplier": reader.integer("hidden_size") ** 0.5,
        "logit_soft_cap": reader.optional_number("final_logit_softcapping", high=MAX_MULTIPLIER),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
        "per_layer_inputs": per_layer if inputs else None,
    }


def _experts(reader: ConfigReader) -> MoE:
    num_experts = read_num_experts(reader, ("num_experts",), None)
    return MoE(
        num_experts=num_experts,
        top_k=reader.integer("top_k_experts", high=num_experts),
        size=read_expert_size(reader, "moe_intermediate_size", None),
        activation=read_activation(reader, "hidden_activation", "gelu_pytorch_tanh"),
        router=RouterConfig(normalize=True, scaled_input=True),
        router_name="router.proj",
    )


def _attention_of_kinds(reader: ConfigReader, positions: int) -> dict[str, AttentionConfig]:
    ropes = read_rope_of_layer_types(reader, positions, {_FULL: 1e6, _SLIDING: 1e4})
    bias, keys_are_values = reader.flag("attention_bias", False), reader.flag("attention_k_eq_v", False)
    sliding = read_attention(
        reader,
        num_kv_heads=4,
        head_dim=256,
        rope=ropes[_SLIDING],
        scale=1.0,
        window=reader.optional_integer("sliding_window", 512),
        qk_norm="head",
        value_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    head_dim, num_kv_heads = _sizes_of_full(reader)
    full = replace(
        sliding,
        rope=ropes[_FULL],
        window=None,
        head_dim=head_dim,
        num_kv_heads=(num_kv_heads if keys_are_values else None) or sliding.num_kv_heads,
        keys_are_values=keys_are_values,
    )
    return {_FULL: full, _SLIDING: sliding}


def _sizes_of_full(reader: ConfigReader) -> tuple[int, int | None]:
    """`head_dim` and KV heads of layers that see everything, by keys of their own or as transformers 5 writes it, by layer."""
    by_layer = reader.mapping("per_layer_config")
    own = next((values for values in by_layer.values() if isinstance(values, dict)), None)
    if by_layer and any(values != own for values in by_layer.values()):
        raise CheckpointError(f"{reader.where}: per_layer_config with layers of several sizes is not supported")
    if own is not None:
        layer = ConfigReader(own, f"{reader.where}, per_layer_config")
        return (
            layer.integer("head_dim", 512, high=MAX_HEAD_DIM),
            layer.optional_integer("num_key_value_heads", None, high=MAX_HEADS),
        )
    return (
        reader.integer("global_head_dim", 512, high=MAX_HEAD_DIM),
        reader.optional_integer("num_global_key_value_heads", None, high=MAX_HEADS),
    )


def _last_of(own: tuple[str, ...], kind: str, reader: ConfigReader) -> int:
    if kind not in own:
        raise CheckpointError(
            f"{reader.where}: num_kv_shared_layers leaves no layer of {shown(kind)} with keys and values of its own"
        )
    return len(own) - 1 - own[::-1].index(kind)


# What config.json leaves out where it is as usual, of the sizes that every model has.
_USUAL_SIZES = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
}
_BESIDE_TEXT_CONFIG = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")


def _text_config(reader: ConfigReader) -> ConfigReader:
    """The text model's part of the config of a model that sees images, too; some keys may stand beside it."""
    beside = {key: reader.values[key] for key in _BESIDE_TEXT_CONFIG if key in reader.values}
    return ConfigReader({**_USUAL_SIZES, **beside, **reader.mapping("text_config")}, f"{reader.where}, text_config")


_MODEL = "pagoda.models.gemma4_model:Gemma4ForCausalLM"
_EXPERTS = (r"(\.layers\.\d+)\.(router|experts)\.", r"\1.moe.\2.")

GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _read,
    model=_MODEL,
    names=CheckpointNames(renames=(_EXPERTS,), stacked=STACKED_EXPERTS),
)
GEMMA4_WITH_VISION = Family(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    _read,
    model=_MODEL,
    names=CheckpointNames(
        renames=((r"^(model\.)?language_model\.(model\.)?", "model."), (r"^model\.lm_head\.", "lm_head."), _EXPERTS),
        stacked=STACKED_EXPERTS,
        ignored=(r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.",),
    ),
    language_model=_text_config,
)
