"""What a model is, read from its checkpoint directory. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import has_file, read_json_object, shown
from pagoda.models.config_reader import MAX_INTEGER, ConfigReader
from pagoda.models.family import MAX_HEADS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_VOCAB_SIZE
from pagoda.models.quantization.config_reader import read_quantization
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.registry import family_of
from pagoda.models.rope_config import RopeConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")
# By the names that transformers has for them.
ACTIVATIONS = {"silu": "silu", "swish": "silu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values that the checkpoint's generation_config.json recommends; None where it has none.

    `top_k` of 0 is off; `max_new_tokens` is for requests that give no limit of their own.
    `do_sample` of False, or absent, means that transformers decodes greedily and ignores the others.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of one of the supported families.

    `num_kv_heads` divides `num_heads`. `layer_windows[i]` is the sliding window of layer i in tokens (a query sees itself
    and the `window - 1` tokens before it), None where it sees everything. `qkv_bias`, `output_bias` and `mlp_bias` say
    which projections have a bias; `qk_norm`, whether queries and keys are normalized per head. `dtype` is the checkpoint's,
    one of `DTYPES`. `eos_token_ids` end generation: generation_config.json's where it names some, else config.json's.
    `quantization`: how the checkpoint stores its linear layers, None if as floats.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    quantization: QuantizationConfig | None = None

    @classmethod
    def from_directory(cls, directory: str | Path, *, generation: bool = True) -> ModelConfig:
        """Read config.json and, where there is one and unless `generation` is false, generation_config.json.

        Raises `CheckpointError`: a file that is missing or not JSON, a value that is missing or impossible, or a model
        that is not supported (its architecture, activation, rope type or quantization), with what is.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"{directory} is not a directory: a checkpoint is a directory with {CONFIG_FILE}")
        has_generation = generation and has_file(path, GENERATION_CONFIG_FILE)
        return cls.from_dicts(
            read_json_object(path, CONFIG_FILE),
            read_json_object(path, GENERATION_CONFIG_FILE) if has_generation else {},
            where=str(path / CONFIG_FILE),
            generation_where=str(path / GENERATION_CONFIG_FILE),
        )

    @classmethod
    def from_dicts(
        cls,
        config: dict[str, Any],
        generation: dict[str, Any] | None = None,
        *,
        where: str = CONFIG_FILE,
        generation_where: str = GENERATION_CONFIG_FILE,
    ) -> ModelConfig:
        """The same from parsed JSON; `where` and `generation_where` name the sources in errors."""
        reader = ConfigReader(config, where)
        family = family_of(reader)
        generation_reader = ConfigReader(generation or {}, generation_where)
        values = {**_common_values(reader), **family.read(reader)}
        model = cls(
            architecture=family.architecture,
            model_type=family.model_type,
            eos_token_ids=_eos_token_ids(generation_reader, reader),
            generation=_generation_defaults(generation_reader),
            quantization=read_quantization(reader),
            **values,
        )
        if model.num_heads % model.num_kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads={model.num_heads} is not a multiple of "
                f"num_key_value_heads={model.num_kv_heads}"
            )
        if model.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim={model.head_dim} is odd; rotary embedding needs pairs")
        if not 1 <= model.max_context_length <= MAX_INTEGER:
            raise CheckpointError(
                f"{where}: max_position_embeddings={model.max_position_embeddings} and the rope parameters make a context of "
                f"{model.max_context_length} tokens; it must have at least 1 and at most {MAX_INTEGER}"
            )
        if model.head_dim == 2 and model.rope.rope_type == "dynamic":
            raise CheckpointError(f"{where}: head_dim=2 is too small for rope type 'dynamic', which needs 4 at least")
        if model.quantization is not None:
            model.quantization.check_patterns(["lm_head", *(name for name, _, _ in model.linear_layers())])
        return model

    @property
    def max_context_length(self) -> int:
        """Longest sequence, in tokens, that the model's positions are meant for, rope scaling included."""
        return self.rope.max_context_length(self.max_position_embeddings)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token's keys and values take in all layers, at `dtype_bytes` an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    @property
    def linear_input_sizes(self) -> tuple[int, int, int]:
        """Inputs of the layers' linear layers: of those that read the residual stream, of attention's output, of the MLP's."""
        return self.hidden_size, self.num_heads * self.head_dim, self.intermediate_size

    def linear_layers(self) -> Iterator[tuple[str, int, int]]:
        """Name in the checkpoint, outputs and inputs of every linear layer but the head."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
            yield f"{attention}q_proj", queries, hidden
            yield f"{attention}k_proj", keys, hidden
            yield f"{attention}v_proj", keys, hidden
            yield f"{attention}o_proj", hidden, queries
            yield f"{mlp}gate_proj", intermediate, hidden
            yield f"{mlp}up_proj", intermediate, hidden
            yield f"{mlp}down_proj", hidden, intermediate

    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query_size + 2 * kv_size)
        attention += (query_size + 2 * kv_size) * self.qkv_bias + self.hidden_size * self.output_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + embeddings


def _eos_token_ids(generation: ConfigReader, config: ConfigReader) -> tuple[int, ...]:
    named_by_generation = generation.values.get("eos_token_id") not in (None, [])
    return (generation if named_by_generation else config).token_ids("eos_token_id")


def _common_values(reader: ConfigReader) -> dict[str, Any]:
    """The fields that all families spell alike; defaults are those of transformers' configuration classes."""
    hidden_act = reader.string("hidden_act", "silu")
    if hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"{reader.where}: activation {shown(hidden_act)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    dtype = reader.string("dtype", reader.string("torch_dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{reader.where}: dtype {shown(dtype)} is not supported; supported: {', '.join(DTYPES)}")
    return {
        "vocab_size": reader.integer("vocab_size", high=MAX_VOCAB_SIZE),
        "hidden_size": reader.integer("hidden_size", high=MAX_HIDDEN_SIZE),
        "intermediate_size": reader.integer("intermediate_size", high=MAX_INTERMEDIATE_SIZE),
        "num_layers": reader.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": reader.integer("num_attention_heads", high=MAX_HEADS),
        "rms_norm_eps": reader.number("rms_norm_eps", 1e-6, high=1.0),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
        "hidden_act": ACTIVATIONS[hidden_act],
        "dtype": dtype,
    }


def _generation_defaults(reader: ConfigReader) -> GenerationDefaults:
    # Top-k is written as -1, too, where it is off.
    top_k = reader.whole_number("top_k", low=-1)
    return GenerationDefaults(
        do_sample=reader.optional_flag("do_sample"),
        # The bounds of `SamplingParams`: else each request that leaves the value out would be refused for it.
        temperature=reader.optional_number("temperature", high=100.0, low_allowed=True),
        top_k=None if top_k is None else max(0, top_k),
        top_p=reader.optional_number("top_p", high=1.0, low_allowed=True),
        min_p=reader.optional_number("min_p", high=1.0, low_allowed=True),
        repetition_penalty=reader.optional_number("repetition_penalty", high=100.0),
        max_new_tokens=reader.whole_number("max_new_tokens", low=1),
    )
