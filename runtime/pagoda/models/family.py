"""The description of a model family, and the reading of config.json that all families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.rope_config import read_rope_config

# Several times what the largest models have. Beyond them a model could not be built in seconds even without its weights.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_HIDDEN_SIZE = 1 << 18
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class Family:
    """A supported family of checkpoints.

    Attributes:
        model_type, architecture: how config.json names it.
        read: the fields of `ModelConfig` that the family spells or defaults in its own way. Defaults are those of its
            configuration class in transformers, which leaves a value out of config.json when it equals them.
        model: `module:class` of the model, imported when one is built.
    """

    model_type: str
    architecture: str
    read: Callable[[ConfigReader], dict[str, Any]]
    model: str = "pagoda.models.decoder:DecoderForCausalLM"


def read_shape(
    reader: ConfigReader, *, num_kv_heads: int | None, head_dim: int | None, max_position_embeddings: int
) -> dict[str, Any]:
    """Heads, positions and rope, with the family's defaults (None: derived from the other sizes)."""
    num_heads, hidden_size = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    if reader.values.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{reader.where}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads} "
            "and head_dim is not given"
        )
    # An explicit null means "as many as query heads" to every family; only an absent key takes the family's default.
    kv_heads = reader.optional_integer("num_key_value_heads", num_kv_heads, high=MAX_HEADS)
    positions = reader.integer("max_position_embeddings", max_position_embeddings)
    head_dim = reader.integer("head_dim", head_dim or hidden_size // num_heads, high=MAX_HEAD_DIM)
    if head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{reader.where}: hidden_size={hidden_size} and num_attention_heads={num_heads} make a head_dim of {head_dim}; "
            f"it must be at most {MAX_HEAD_DIM}"
        )
    return {
        "num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rope": read_rope_config(reader, positions),
    }


def read_layer_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Windows by `layer_types`, or by `max_window_layers` where those are not given, if `use_sliding_window`."""
    num_layers = reader.integer("num_hidden_layers")
    window = reader.optional_integer("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    layer_types = reader.values.get("layer_types")
    if layer_types is None:
        first = reader.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) and kind in known for kind in layer_types):
        raise reader.error("layer_types", f"a list of {' and '.join(known)}")
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"{reader.where}: layer_types has {len(layer_types)} entries, num_hidden_layers is {num_layers}"
        )
    return tuple(known[kind] for kind in layer_types)
