"""Multi-token prediction (DeepSeek-V3, section 2.2): which layer of a checkpoint drafts, as a model of one layer; no torch.

Behind the layers of the model the checkpoint has one more, with what joins a token to a hidden state of the model:

    model.layers.N.{enorm, hnorm, eh_proj}    model.layers.N.<a layer as the last one>    model.layers.N.shared_head.norm
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import read_json_object
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import MAX_LAYERS

ARCHITECTURES = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM")
"""Families that have such a layer behind their last one."""


def read_mtp_config(directory: str | Path, model: ModelConfig) -> ModelConfig:
    """The layer of `model`, whose checkpoint is in `directory`. Raises `CheckpointError` where it has none that is served."""
    if model.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{model.architecture} has no MTP layer that is supported; supported are those of {', '.join(ARCHITECTURES)}"
        )
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{directory}: an MTP layer is read from safetensors files, not from GGUF")
    reader = ConfigReader(read_json_object(path, CONFIG_FILE), str(path / CONFIG_FILE))
    if not reader.optional_integer("num_nextn_predict_layers", None, low=0, high=MAX_LAYERS):
        raise CheckpointError(f"{reader.where}: num_nextn_predict_layers says that there is no MTP layer")
    number = model.num_layers
    own = rf"^model\.layers\.{number}\."
    names = replace(
        model.names,
        renames=(
            *model.names.renames,
            (rf"^model\.layers\.(?!{number}\.)", "target.layers."),
            (r"^model\.norm\.", "target.norm."),
            # Those of the model, which are the same.
            (rf"{own}(embed_tokens|shared_head\.head)\.", r"target.\1."),
            (rf"{own}shared_head\.norm\.", "model.norm."),
            (own, "model.layers.0."),
        ),
        ignored=(*model.names.ignored, r"^target\."),
    )
    return replace(model, layers=(model.layers[-1],), names=names, is_mtp=True)
