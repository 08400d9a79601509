"""What a model is that has no family here and runs through transformers (`transformers_model`).

config.json alone says of which kind it is. All else is transformers' to say, which reads the file with the defaults of the
model's own configuration class: it is imported here, and torch with it, where there is such a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family
from pagoda.models.layer_config import AttentionConfig, DenseMLP, LayerConfig, LinearShape, TensorShape, VectorShape

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Keys, and beginnings of model types, of models whose layers keep a state and not keys and values.
_STATE_KEYS = (
    "ssm_cfg",
    "state_size",
    "ssm_state_size",
    "mamba_d_state",
    "linear_attn_config",
    "linear_conv_kernel_dim",
    "time_step_rank",
)
_STATE_TYPES = (
    "mamba",
    "falcon_mamba",
    "falcon_h1",
    "nemotron_h",
    "jamba",
    "bamba",
    "zamba",
    "kimi_linear",
    "rwkv",
    "xlstm",
    "recurrent_gemma",
)
# How many keys a token attends to, in DeepSeek's sparse attention.
_SPARSE_KEY = "index_topk"
# Entries of `layer_types` and `layers_block_type` that name such a layer.
_STATE_LAYERS = ("mamba", "mamba2", "linear_attention", "conv", "recurrent", "lightning_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersDetails:
    """`values`: config.json; `parameters`: every tensor of the model by name, as transformers has it."""

    values: Mapping[str, Any] = field(hash=False)
    parameters: tuple[TensorShape, ...]

    def hf_config(self) -> PretrainedConfig:
        """As transformers takes it."""
        return _hf_config(self.values, "config.json")


def transformers_family(reader: ConfigReader) -> Family:
    """The family, of one checkpoint, of a model that runs through transformers.

    Raises `CheckpointError` for a model that transformers does not have, or that does not attend through its interface.
    """
    check_kind(reader)
    observed = _observed(json.dumps(dict(reader.values), sort_keys=True), reader.where)
    filled = {**reader.values, **observed.defaults}
    return Family(
        model_type=observed.model_type,
        architecture=observed.architecture,
        read=lambda _: observed.fields,
        language_model=lambda _: ConfigReader(filled, reader.where),
    )


def check_kind(reader: ConfigReader) -> None:
    """Raise `CheckpointError` for what no decoder of transformers is, by config.json alone and at once."""
    values, where = reader.values, reader.where
    model_type = values.get("model_type")
    if values.get("is_encoder_decoder") is True:
        raise CheckpointError(f"{where}: {shown(model_type)} is an encoder-decoder model; Pagoda serves decoders alone")
    if _keeps_state(values):
        raise CheckpointError(
            f"{where}: layers of {shown(model_type)} keep a state (state-space, recurrent or linear attention); "
            "model_impl=transformers serves models whose layers all keep keys and values"
        )
    if values.get(_SPARSE_KEY) is not None:
        raise CheckpointError(
            f"{where}: {shown(model_type)} attends to keys that it chooses (sparse attention, {_SPARSE_KEY}), which is not "
            "supported"
        )
    if values.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: {shown(model_type)} has no family here, and quantized checkpoints run with Pagoda's own families only"
        )
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: without a model_type transformers does not know the model either")
    if values.get("auto_map") is not None and not _has_module(model_type):
        raise CheckpointError(
            f"{where}: {shown(model_type)} is made of code in its repository (auto_map), which Pagoda does not run"
        )


def _keeps_state(values: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state; where layers are named, only they count."""
    for key in ("layer_types", "layers_block_type"):
        kinds = values.get(key)
        if isinstance(kinds, list) and kinds:
            return any(kind in _STATE_LAYERS for kind in kinds)
    has_key = any(values.get(key) is not None for key in _STATE_KEYS)
    return has_key or str(values.get("model_type")).startswith(_STATE_TYPES)


@dataclass(frozen=True, slots=True)
class _Observed:
    """What transformers says of a model: config.json with all defaults, and fields of `ModelConfig`."""

    architecture: str
    model_type: str
    defaults: dict[str, Any]
    fields: dict[str, Any]


@lru_cache(maxsize=4)
def _observed(text: str, where: str) -> _Observed:
    # torch, and transformers
    from pagoda.models.transformers_model import ATTENTION, model_without_memory, observed_attention

    config = _hf_config(json.loads(text), where)
    try:
        model = model_without_memory(config)
        calls = observed_attention(model)
    except Exception as error:  # of whatever type the model's own code raises
        # A model without the interface looks its attention up in a table of its own.
        is_not_there = isinstance(error, KeyError) and error.args == (ATTENTION,)
        reason = (
            "its attention does not use it" if is_not_there else (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise CheckpointError(
            f"{where}: {type(config).__name__} cannot run through transformers' attention interface: {reason}"
        ) from error
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise CheckpointError(f"{where}: it names no longest sequence (max_position_embeddings)")
    layers = tuple(
        LayerConfig(
            attention=AttentionConfig(
                num_heads=call.query.shape[1],
                num_kv_heads=call.key.shape[1],
                head_dim=call.key.shape[3],
                scale=call.scale,
                rope=None,  # transformers' own
                window=call.window,
                soft_cap=call.soft_cap,
            ),
            mlp=DenseMLP(size=1),  # likewise
        )
        for call in calls
    )
    fields = {
        "layers": layers,
        "max_position_embeddings": longest,
        "max_context_length": longest,
        "transformers": TransformersDetails(values=json.loads(text), parameters=tuple(_shapes(model))),
    }
    defaults = text_config.to_dict()
    for name in ("vocab_size", "hidden_size", "tie_word_embeddings"):  # by these names whatever the family calls them
        defaults[name] = getattr(text_config, name)
    return _Observed(type(model).__name__, config.model_type, defaults, fields)


def _shapes(model: nn.Module) -> Iterator[TensorShape]:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith(".weight"):
            yield LinearShape(name.removesuffix(".weight"), *parameter.shape)
        else:
            yield VectorShape(name, parameter.numel())


def _hf_config(values: Mapping[str, Any], where: str) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = values["model_type"]
    others = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    try:
        config = AutoConfig.for_model(model_type, **others)
    except Exception as error:  # of whatever type a configuration class raises
        raise CheckpointError(
            f"{where}: transformers does not take this configuration of {shown(model_type)}: {str(error).splitlines()[0]}"
        ) from error
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(f"{where}: transformers has no causal language model of type {shown(model_type)}")
    # Nothing is padded here; some models would look for padding in every step.
    config.pad_token_id = config.get_text_config().pad_token_id = None
    return config


def _has_module(model_type: str) -> bool:
    """Whether transformers has a folder for this type; it is not imported for that."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir()
