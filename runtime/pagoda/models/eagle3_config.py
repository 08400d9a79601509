"""What an EAGLE-3 head is (Li et al., 2025), read from its checkpoint's config.json; no torch.

Two forms are in use: the one of SGLang and vLLM, a Llama configuration with further keys, and the one of vLLM's `speculators`,
in which the layer's own configuration is an object of its own.

    {"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": …, "draft_vocab_size": …}
    {"speculators_model_type": "eagle3", "transformer_layer_config": {"hidden_size": …}, "draft_vocab_size": …}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import read_json_object, shown
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import MAX_HIDDEN_SIZE, MAX_LAYERS, MAX_VOCAB_SIZE

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
_NUM_AUX_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """An EAGLE-3 head of one layer.

    `layer`: the shape of the layer, as that of a model with it alone; its `vocab_size` and `hidden_size` are the head's.
    `draft_vocab_size`: the tokens that it can propose. `target_hidden_size`: of the model it was trained for.
    `aux_layers`: the layers of that model whose inputs it sees (see `AuxHiddenStates`); None: the second, the middle one and
    the third last. `norm_before_residual`: the residual stream is the normed hidden state. `norm_before_fc`: one norm over
    what goes into `fc`; `fc_norm`: one for each layer's part of it. `norm_output`: the next draft's hidden state is the
    normed one. `target_architectures`: those of the model, where the checkpoint names it.
    """

    layer: ModelConfig
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    tie_word_embeddings: bool = False
    target_architectures: tuple[str, ...] = ()

    @classmethod
    def from_directory(cls, directory: str | Path) -> Eagle3Config:
        """Read config.json. Raises `CheckpointError` where it is missing, or not that of a head which can be served."""
        path = Path(directory)
        return cls.from_dict(read_json_object(path, CONFIG_FILE), str(path / CONFIG_FILE))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = CONFIG_FILE) -> Eagle3Config:
        """The same from parsed JSON; `where` names the source in errors."""
        if not is_eagle3(values):
            found = values.get("speculators_model_type") or values.get("architectures") or values.get("model_type")
            raise CheckpointError(
                f"{where}: {shown(found)} is no EAGLE-3 head: its architectures must name one of {', '.join(ARCHITECTURES)}, "
                "or its speculators_model_type be eagle3"
            )
        reader = ConfigReader(values, where)
        is_speculators = "speculators_model_type" in values
        layer = reader.mapping("transformer_layer_config") if is_speculators else values
        shape = _read_layer(layer, f"{where}, transformer_layer_config" if is_speculators else where)
        # NVIDIA's heads have some keys in an object of their own.
        nested = ConfigReader(reader.mapping("eagle_config"), f"{where}, eagle_config")
        if not nested.flag("use_aux_hidden_state", True):
            raise CheckpointError(f"{where}: use_aux_hidden_state must be true, as it is for EAGLE-3")
        target_hidden_size = reader.optional_integer("target_hidden_size", None, high=MAX_HIDDEN_SIZE)
        draft_vocab_size = reader.optional_integer("draft_vocab_size", None, high=MAX_VOCAB_SIZE) or shape.vocab_size
        if draft_vocab_size > shape.vocab_size:
            raise CheckpointError(
                f"{where}: draft_vocab_size={draft_vocab_size} is more than the vocabulary of {shape.vocab_size} tokens"
            )
        return cls(
            layer=shape,
            draft_vocab_size=draft_vocab_size,
            target_hidden_size=target_hidden_size or shape.hidden_size,
            aux_layers=_read_aux_layers(reader, nested),
            # Each form has its own default.
            norm_before_residual=reader.flag("norm_before_residual", is_speculators),
            norm_before_fc=reader.flag("norm_before_fc", nested.flag("norm_before_fc", False)),
            fc_norm=reader.flag("fc_norm", False),
            norm_output=reader.flag("norm_output", False),
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            target_architectures=_read_target_architectures(reader),
        )

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a model of `num_layers` whose inputs the head sees."""
        if self.aux_layers is not None:
            return self.aux_layers
        return min(2, num_layers), num_layers // 2, max(0, num_layers - 3)

    def misfit(self, target: ModelConfig) -> str | None:
        """Why the head is not for the model `target`; None if it is, as far as can be seen."""
        if self.layer.vocab_size != target.vocab_size:
            return f"has a vocabulary of {self.layer.vocab_size} tokens, the model one of {target.vocab_size}"
        if self.target_hidden_size != target.hidden_size:
            return (
                f"is for a model with a hidden_size of {self.target_hidden_size} (target_hidden_size), "
                f"the model has {target.hidden_size}"
            )
        layers = self.layers_of(target.num_layers)
        if max(layers) > target.num_layers:
            return f"reads the layers {', '.join(map(str, layers))}, the model has {target.num_layers}"
        if self.target_architectures and target.architecture not in self.target_architectures:
            return f"is for {' or '.join(self.target_architectures)}, the model is {target.architecture}"
        return None


def is_eagle3(values: dict[str, Any]) -> bool:
    """Whether config.json is that of an EAGLE-3 head."""
    if "speculators_model_type" in values:
        return bool(values["speculators_model_type"] == "eagle3")
    architectures = values.get("architectures")
    return isinstance(architectures, list) and any(name in ARCHITECTURES for name in architectures)


def _read_layer(values: dict[str, Any], where: str) -> ModelConfig:
    config = ModelConfig.from_dicts({**values, "architectures": []}, where=where)
    if config.num_layers != 1:
        raise CheckpointError(
            f"{where}: num_hidden_layers={config.num_layers} is not supported: an EAGLE-3 head has one"
        )
    if config.quantization is not None:
        raise CheckpointError(f"{where}: a quantized EAGLE-3 head is not supported")
    return config


def _read_aux_layers(reader: ConfigReader, nested: ConfigReader) -> tuple[int, ...] | None:
    key = "eagle_aux_hidden_state_layer_ids"
    # At the top they are layers whose input is read, as vLLM has it; in eagle_config those whose output is, as in SGLang.
    for source, shift in ((reader, 0), (nested, 1)):
        layers = source.values.get(key)
        if not layers:
            continue
        is_list = isinstance(layers, list) and all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in layers)
        if not is_list or len(layers) != _NUM_AUX_LAYERS:
            raise source.error(key, f"a list of {_NUM_AUX_LAYERS} layers")
        return tuple(layer + shift for layer in layers)
    return None


def _read_target_architectures(reader: ConfigReader) -> tuple[str, ...]:
    speculators = ConfigReader(reader.mapping("speculators_config"), reader.where)
    return ConfigReader(speculators.mapping("verifier"), reader.where).strings("architectures")
