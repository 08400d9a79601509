"""What an encoder is, read from its checkpoint directory. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_VOCAB_SIZE

DTYPES = ("float32", "bfloat16", "float16")
# By the names that transformers has for them.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "geglu": "gelu",
}
MAX_TYPES = 1024
MAX_BUCKETS = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a part of the model is in a checkpoint: `names`, of which one is there, without `.weight` and `.bias`.

    `{i}` is the number of the layer.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, *names: str) -> Stored:
        """One of these names."""
        return cls(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderNames:
    """Where an encoder's tensors are.

    `qkv` and `up`: parts whose outputs follow each other, or one that has them all; of several ways to store them, the first
    that is there. `prefixes`: what may stand before all names, for models with a head.
    """

    words: Stored
    positions: Stored | None = None
    types: Stored | None = None
    embedding_norm: Stored | None = None
    qkv: tuple[tuple[Stored, ...], ...]
    output: Stored
    attention_norm: Stored
    up: tuple[tuple[Stored, ...], ...]
    down: Stored
    mlp_norm: Stored
    final_norm: Stored | None = None
    relative_bias: str = ""
    prefixes: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder of one of the supported families.

    `max_context_length`: tokens of the longest text. `position_offset`: where the table of positions begins for the first
    token. `num_types`: token types, 0 without. `norm_first` and `gated`: see `KernelBackend.encoder`. `windows[i]`: how far a
    token of layer i sees to both sides, 0: all of the text. `ropes[i]`: the base frequency of layer i's rotary embedding, None
    without. `relative_buckets`: of relative positions, 0 without. `first_norm`: whether the first layer has a norm before
    attention. `qkv_bias` … say which linear layers and norms have a bias.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_context_length: int
    position_offset: int = 0
    num_types: int = 0
    norm_eps: float = 1e-12
    norm_first: bool = False
    first_norm: bool = True
    gated: bool = False
    activation: str = "gelu"
    windows: tuple[int, ...] = ()
    ropes: tuple[float | None, ...] = ()
    relative_buckets: int = 0
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    names: EncoderNames
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linear_input_sizes(self) -> tuple[int, int]:
        """Inputs of its linear layers."""
        return self.hidden_size, self.intermediate_size

    def num_parameters(self) -> int:
        """Weights of embeddings and layers, those of norms and biases left out."""
        attention = 4 * self.hidden_size**2
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        table = self.max_context_length if self.names.positions is not None else 0
        return self.num_layers * (attention + mlp) + (self.vocab_size + table) * self.hidden_size


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """A supported family of checkpoints: `model_types` and, for those without one, the base model's `architectures`.

    `read`: the fields of `EncoderConfig` that the family spells in its own way, `names` among them.
    """

    model_types: tuple[str, ...]
    architecture: str
    read: Callable[[ConfigReader], dict[str, Any]]


def read_encoder(family: EncoderFamily, values: Mapping[str, Any], where: str | Path) -> EncoderConfig:
    """The configuration. Raises `CheckpointError` for a value that is missing or impossible."""
    reader = ConfigReader(values, str(where))
    fields = family.read(reader)
    architectures = reader.strings("architectures")
    config = EncoderConfig(
        architecture=architectures[0] if architectures else family.architecture,
        model_type=family.model_types[0],
        dtype=_dtype(reader),
        labels=_labels(reader),
        values=dict(values),
        **fields,
    )
    if config.hidden_size % config.num_heads:
        raise CheckpointError(
            f"{where}: hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_heads}"
        )
    if any(rope is not None for rope in config.ropes) and config.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim={config.head_dim} is odd; rotary embedding needs pairs")
    if config.max_context_length < 1:
        raise CheckpointError(f"{where}: max_position_embeddings leaves no position for a token")
    return config


def read_sizes(
    reader: ConfigReader,
    *,
    hidden_size: str = "hidden_size",
    num_layers: str = "num_hidden_layers",
    num_heads: str = "num_attention_heads",
    intermediate_size: str = "intermediate_size",
    defaults: tuple[int, int, int, int, int],
) -> dict[str, int]:
    """The sizes under the family's names; `defaults`: vocabulary, hidden, layers, heads, intermediate."""
    vocab, hidden, layers, heads, intermediate = defaults
    return {
        "vocab_size": reader.integer("vocab_size", vocab, high=MAX_VOCAB_SIZE),
        "hidden_size": reader.integer(hidden_size, hidden, high=MAX_HIDDEN_SIZE),
        "num_layers": reader.integer(num_layers, layers, high=MAX_LAYERS),
        "num_heads": reader.integer(num_heads, heads, high=MAX_HEADS),
        "intermediate_size": reader.integer(intermediate_size, intermediate, high=MAX_INTERMEDIATE_SIZE),
    }


def read_activation(reader: ConfigReader, key: str, default: str = "gelu") -> str:
    """The activation's name in the kernels."""
    name = reader.string(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{reader.where}: {key} {shown(name)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _dtype(reader: ConfigReader) -> str:
    dtype = reader.string("dtype", reader.string("torch_dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{reader.where}: dtype {shown(dtype)} is not supported; supported: {', '.join(DTYPES)}")
    return dtype


def _labels(reader: ConfigReader) -> tuple[str, ...]:
    return labels_of(reader.values)


def labels_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's outputs, in order."""
    named = values.get("id2label")
    if isinstance(named, dict) and named:
        try:
            by_index = {int(index): str(label) for index, label in named.items()}
        except (TypeError, ValueError):
            raise CheckpointError("config.json: id2label must have a label for each index") from None
        if sorted(by_index) == list(range(len(by_index))):
            return tuple(by_index[index] for index in range(len(by_index)))
    count = values.get("num_labels", 2)
    return tuple(f"LABEL_{index}" for index in range(count if isinstance(count, int) and 0 < count < 65536 else 2))
