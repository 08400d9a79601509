"""The description of a model family, and the reading of config.json that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.layer_config import Activation, AttentionConfig, DenseMLP, NormConfig
from pagoda.models.rope_config import RopeConfig

# Several times what the largest models have. Beyond them a model could not be built in seconds even without its weights.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_HIDDEN_SIZE = 1 << 18
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 24
MAX_EXPERTS = 4096
MAX_EXPERTS_OF_ALL_LAYERS = 1 << 17
MAX_MULTIPLIER = 1e6

# By the names that transformers has for them.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}

KINDS_OF_ATTENTION = ("full_attention", "sliding_attention")


def _itself(reader: ConfigReader) -> ConfigReader:
    return reader


@dataclass(frozen=True, slots=True)
class Family:
    """A supported family of checkpoints.

    Attributes:
        model_type, architecture: how config.json names it.
        read: the fields of `ModelConfig` that the family spells or defaults in its own way, `layers` at least. Defaults are
            those of its configuration class in transformers, which leaves a value out of config.json when it equals them.
        model: `module:class` of the model, imported when one is built.
        names: how its checkpoints name and lay out tensors.
        language_model: the part of config.json that describes the language model, where it describes more.
    """

    model_type: str
    architecture: str
    read: Callable[[ConfigReader], dict[str, Any]]
    model: str = "pagoda.models.decoder:DecoderForCausalLM"
    names: CheckpointNames = field(default_factory=CheckpointNames)
    language_model: Callable[[ConfigReader], ConfigReader] = _itself


def read_num_layers(reader: ConfigReader) -> int:
    """`num_hidden_layers`, bounded."""
    return reader.integer("num_hidden_layers", high=MAX_LAYERS)


def read_attention(
    reader: ConfigReader, *, num_kv_heads: int | None, head_dim: int | None, rope: RopeConfig | None, **values: Any
) -> AttentionConfig:
    """Heads, with the family's defaults (None: derived from the other sizes), and `values` for the rest; scaled as usual."""
    num_heads, hidden_size = reader.integer("num_attention_heads", high=MAX_HEADS), reader.integer("hidden_size")
    if reader.values.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{reader.where}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads} "
            "and head_dim is not given"
        )
    # An explicit null means "as many as query heads" to every family; only an absent key takes the family's default.
    kv_heads = reader.optional_integer("num_key_value_heads", num_kv_heads, high=MAX_HEADS)
    head_dim = reader.integer("head_dim", head_dim or hidden_size // num_heads, high=MAX_HEAD_DIM)
    if head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{reader.where}: hidden_size={hidden_size} and num_attention_heads={num_heads} make a head_dim of {head_dim}; "
            f"it must be at most {MAX_HEAD_DIM}"
        )
    values.setdefault("scale", head_dim**-0.5 if head_dim else 1.0)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rope=rope,
        **values,
    )


def read_mlp(
    reader: ConfigReader,
    *,
    bias: bool = False,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    size: int | None = None,
) -> DenseMLP:
    """The gated MLP; `activation` is the family's default, and `size` the number of units where that is another key's."""
    return DenseMLP(
        size=reader.integer("intermediate_size", high=MAX_INTERMEDIATE_SIZE) if size is None else size,
        activation=read_activation(reader, activation_key, activation),
        bias=bias,
    )


def read_activation(reader: ConfigReader, key: str = "hidden_act", default: str = "silu") -> Activation:
    """Raises `CheckpointError`, with those that are supported, for another."""
    found = reader.string(key, default)
    if found not in ACTIVATIONS:
        raise CheckpointError(
            f"{reader.where}: activation {shown(found)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[found]


def read_positions(reader: ConfigReader, default: int) -> int:
    """`max_position_embeddings`."""
    return reader.integer("max_position_embeddings", default)


def read_norm(reader: ConfigReader, eps: float, **values: Any) -> NormConfig:
    """RMSNorm with `rms_norm_eps`, `eps` being the family's default."""
    return NormConfig(eps=reader.number("rms_norm_eps", eps, high=1.0), **values)


def read_num_experts(reader: ConfigReader, keys: tuple[str, ...], default: int | None) -> int:
    """The number of experts under the first of `keys` that is given; bounded for all layers together, too. One must be given
    where `default` is None."""
    key = next((key for key in keys if reader.values.get(key) is not None), keys[0])
    num_experts, num_layers = reader.integer(key, default, high=MAX_EXPERTS), read_num_layers(reader)
    if num_experts * num_layers > MAX_EXPERTS_OF_ALL_LAYERS:
        raise CheckpointError(
            f"{reader.where}: {key}={num_experts} in num_hidden_layers={num_layers} makes {num_experts * num_layers} experts; "
            f"at most {MAX_EXPERTS_OF_ALL_LAYERS} are allowed"
        )
    return num_experts


def read_top_k(reader: ConfigReader, num_experts: int, default: int | None) -> int:
    """`num_experts_per_tok`, at most `num_experts`; it must be given where `default` is None."""
    default = None if default is None else min(default, num_experts)
    return reader.integer("num_experts_per_tok", default, high=num_experts)


def read_expert_size(reader: ConfigReader, key: str, default: int | None) -> int:
    """Units of an expert; they must be given where `default` is None."""
    return reader.integer(key, default, high=MAX_INTERMEDIATE_SIZE)


def read_multiplier(reader: ConfigReader, key: str, default: float) -> float:
    """A positive factor."""
    return reader.number(key, default, high=MAX_MULTIPLIER)


def read_layer_types(
    reader: ConfigReader, default: Callable[[int], bool], kinds: tuple[str, str] = KINDS_OF_ATTENTION
) -> tuple[str, ...]:
    """`layer_types`, each one of `kinds`; where that is not given, layer i is of the second kind if `default(i)`."""
    num_layers = read_num_layers(reader)
    layer_types = reader.values.get("layer_types")
    if layer_types is None:
        return tuple(kinds[default(layer)] for layer in range(num_layers))
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) and kind in kinds for kind in layer_types):
        raise reader.error("layer_types", f"a list of {' and '.join(kinds)}")
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"{reader.where}: layer_types has {len(layer_types)} entries, num_hidden_layers is {num_layers}"
        )
    return tuple(layer_types)


def read_windows(
    reader: ConfigReader, default: Callable[[int], bool], window: int | None = 4096
) -> tuple[int | None, ...]:
    """The window of each layer, `sliding_window` in those that slide by `read_layer_types`."""
    windows = {"full_attention": None, "sliding_attention": reader.optional_integer("sliding_window", window)}
    return by_kind(read_layer_types(reader, default), windows)


def read_layer_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Windows by `layer_types`, or by `max_window_layers` where those are not given, if `use_sliding_window` (Qwen)."""
    first = reader.integer("max_window_layers", 28, low=0)
    kinds = read_layer_types(reader, lambda layer: layer >= first)
    window = reader.optional_integer("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    return by_kind(kinds, {"full_attention": None, "sliding_attention": window})


def by_kind(kinds: tuple[str, ...], layers: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `layers` has for each of `kinds`."""
    return tuple(layers[kind] for kind in kinds)
