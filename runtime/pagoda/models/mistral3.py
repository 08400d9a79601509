"""Ministral 3: Mistral's shape, where queries grow with positions beyond the original length; and the text models of Mistral 3
(Mistral Small 3.1 and 3.2, Devstral Small, Ministral 3), which see images, too."""

from __future__ import annotations

from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.checkpoint_names import STACKED_EXPERTS, CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.deepseek import read_mistral4
from pagoda.models.family import Family, read_attention, read_mlp, read_norm, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.mistral import read_mistral
from pagoda.models.rope_config import read_rope_config, with_default_rope, with_query_scaling


def _read_ministral3(reader: ConfigReader) -> dict[str, Any]:
    reader = with_default_rope(
        reader,
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    )
    positions = read_positions(reader, 262144)
    attention = read_attention(
        reader,
        num_kv_heads=8,
        head_dim=128,
        rope=with_query_scaling(reader, read_rope_config(reader, positions)),
        window=reader.optional_integer("sliding_window", None),
    )
    return {
        "layers": (LayerConfig(attention=attention, mlp=read_mlp(reader)),) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
    }


_TEXT_MODELS = {"mistral": read_mistral, "ministral3": _read_ministral3, "mistral4": read_mistral4}
_BESIDE_TEXT_CONFIG = ("dtype", "torch_dtype", "eos_token_id", "quantization_config", "tie_word_embeddings")


def _text_config(reader: ConfigReader) -> ConfigReader:
    """The text model's part; some keys may stand beside it."""
    beside = {key: reader.values[key] for key in _BESIDE_TEXT_CONFIG if key in reader.values}
    text = {"tie_word_embeddings": True, **beside, **reader.mapping("text_config")}
    return ConfigReader(text, f"{reader.where}, text_config")


def _read_text(reader: ConfigReader) -> dict[str, Any]:
    kind = reader.string("model_type", "mistral")
    if kind not in _TEXT_MODELS:
        raise CheckpointError(
            f"{reader.where}: model_type {shown(kind)} is not supported; supported: {', '.join(_TEXT_MODELS)}"
        )
    return _TEXT_MODELS[kind](reader)


MINISTRAL3 = Family("ministral3", "Ministral3ForCausalLM", _read_ministral3)
MISTRAL3_WITH_VISION = Family(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    _read_text,
    names=CheckpointNames(
        renames=((r"^(model\.)?language_model\.(model\.)?", "model."), (r"^model\.lm_head\.", "lm_head.")),
        stacked=STACKED_EXPERTS,
        ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    ),
    language_model=_text_config,
)
