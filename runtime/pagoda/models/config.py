"""What a model is, read from its checkpoint directory. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.checkpoint_files import has_file, is_checkpoint, read_json_object, shown
from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import MAX_INTEGER, ConfigReader
from pagoda.models.family import MAX_HIDDEN_SIZE, MAX_VOCAB_SIZE
from pagoda.models.layer_config import (
    AttentionConfig,
    DeltaNetConfig,
    LayerConfig,
    LinearShape,
    MLAConfig,
    MoE,
    NormConfig,
    PerLayerInputs,
    TensorShape,
    VectorShape,
    within,
)
from pagoda.models.quantization.config_reader import read_quantization
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.registry import family_of
from pagoda.models.transformers_config import TransformersDetails
from pagoda.scheduling.kv_groups import (
    KVGroups,
    KVSpec,
    LatentKV,
    RecurrentState,
    SharedKV,
    group_layers,
    page_elements,
)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")
MAX_GPU_HEAD_DIM = 256
"""The widest heads that the tables of `pagoda_kernels.tuned` have configurations for."""
MAX_GPU_LATENT_DIM = 576
"""The longest vectors of latent attention, likewise."""
LATENT_CAPABILITY = (8, 0)
"""The first compute capability with the shared memory that latent attention takes."""


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

    `layers` describe themselves; `norm` is the kind of all norms. Embeddings are multiplied by `embedding_multiplier`, logits
    by `logit_multiplier`, and then become `logit_soft_cap * tanh(logit / logit_soft_cap)`, where that is not None.
    `max_context_length` is the longest sequence, in tokens, that the model's positions are meant for, rope scaling included.
    `dtype` is the checkpoint's, one of `DTYPES`. `eos_token_ids` end generation: generation_config.json's where it names some,
    else config.json's. `quantization`: how the checkpoint stores its linear layers, None if as floats. `names`: how it names
    and lays out its tensors. `per_layer_inputs`: what layers get beside the stream, None: nothing. `transformers`: of a model
    that runs through transformers; its `layers` only say how it attends. `is_mtp`: the one layer drafts for a model
    (`mtp_config`).
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    max_position_embeddings: int
    max_context_length: int
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    per_layer_inputs: PerLayerInputs | None = None
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    quantization: QuantizationConfig | None = None
    names: CheckpointNames = field(default_factory=CheckpointNames)
    transformers: TransformersDetails | None = None
    is_mtp: bool = False

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, generation: bool = True, model_impl: str = "pagoda"
    ) -> ModelConfig:
        """Read config.json and, where there is one and unless `generation` is false, generation_config.json.

        `directory` may be a GGUF file, here as everywhere: see `models.checkpoint_files`.

        Raises `CheckpointError`: a file that is missing or not JSON, a value that is missing or impossible, or a model
        that is not supported (its architecture, activation, rope type or quantization), with what is.
        """
        path = Path(directory)
        if not is_checkpoint(path):
            raise CheckpointError(
                f"{directory} is not there: a checkpoint is a directory with {CONFIG_FILE}, or a GGUF file"
            )
        has_generation = generation and has_file(path, GENERATION_CONFIG_FILE)
        return cls.from_dicts(
            read_json_object(path, CONFIG_FILE),
            read_json_object(path, GENERATION_CONFIG_FILE) if has_generation else {},
            where=str(path / CONFIG_FILE),
            generation_where=str(path / GENERATION_CONFIG_FILE),
            model_impl=model_impl,
        )

    @classmethod
    def from_dicts(
        cls,
        config: dict[str, Any],
        generation: dict[str, Any] | None = None,
        *,
        where: str = CONFIG_FILE,
        generation_where: str = GENERATION_CONFIG_FILE,
        model_impl: str = "pagoda",
    ) -> ModelConfig:
        """The same from parsed JSON; `where` and `generation_where` name the sources in errors."""
        reader = ConfigReader(config, where)
        family = family_of(reader, model_impl)
        reader = family.language_model(reader)
        generation_reader = ConfigReader(generation or {}, generation_where)
        values = {**_common_values(reader), **family.read(reader)}
        if "transformers" not in values:
            for layer in dict.fromkeys(values["layers"]):
                if isinstance(layer.attention, DeltaNetConfig):
                    check_delta_net(layer.attention, where)
                else:
                    check_attention(layer.attention, where)
        values.setdefault("max_context_length", longest_context(values["layers"], values["max_position_embeddings"]))
        model = cls(
            architecture=family.architecture,
            model_type=family.model_type,
            names=family.names,
            eos_token_ids=_eos_token_ids(generation_reader, reader),
            generation=_generation_defaults(generation_reader),
            quantization=read_quantization(reader),
            **values,
        )
        if not 1 <= model.max_context_length <= MAX_INTEGER:
            raise CheckpointError(
                f"{where}: max_position_embeddings={model.max_position_embeddings} and the rope parameters make a context of "
                f"{model.max_context_length} tokens; it must have at least 1 and at most {MAX_INTEGER}"
            )
        if model.quantization is not None:
            model.quantization.check_patterns(["lm_head", *(linear.name for linear in model.linears())])
        return model

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layers)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, see `AttentionConfig`."""
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of the layer that has most."""
        return max((layer.num_heads for layer in self._attention_layers()), default=1)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer that has most."""
        return max((layer.num_kv_heads for layer in self._attention_layers()), default=1)

    @property
    def head_dim(self) -> int:
        """Of the layer with the widest heads."""
        return max((layer.head_dim for layer in self._attention_layers()), default=1)

    def _attention_layers(self) -> list[AttentionConfig | MLAConfig]:
        return [layer.attention for layer in self.layers if not isinstance(layer.attention, DeltaNetConfig)]

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each layer keeps of a request's tokens."""
        return tuple(layer.kv_spec for layer in self.layers)

    @property
    def has_recurrent_layers(self) -> bool:
        """Whether some layers keep a state and not tokens."""
        return any(isinstance(spec, RecurrentState) for spec in self.kv_specs)

    def kv_groups(self, block_size: int, max_model_len: int | None = None) -> KVGroups:
        """Which layers share block tables, for sequences of up to `max_model_len` tokens; None: the model's own limit."""
        return group_layers(self.kv_specs, max_model_len or self.max_context_length, block_size)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token's keys and values take in all layers that keep them, at `dtype_bytes` an element."""
        return dtype_bytes * sum(
            page_elements(spec.page_shapes(1)) for spec in self.kv_specs if not isinstance(spec, RecurrentState)
        )

    def kv_bytes_per_sequence(self, dtype_bytes: int) -> int:
        """Bytes that the longest sequence takes while it decodes, of which layers with a window keep no more than that."""
        return sum(self._layer_bytes(spec, dtype_bytes) for spec in self.kv_specs)

    def _layer_bytes(self, spec: KVSpec, dtype_bytes: int) -> int:
        """Bytes that a layer keeps of the longest sequence."""
        length, window = self.max_context_length, spec.rule.window
        if isinstance(spec, RecurrentState):
            length = 1
        elif window is not None:
            length = min(length, window)
        return length * page_elements(spec.page_shapes(1)) * spec.element_bytes(dtype_bytes)

    @property
    def linear_input_sizes(self) -> tuple[int, ...]:
        """The different numbers of inputs that the layers' linear layers have; of those that stay floats, none."""
        return tuple(dict.fromkeys(linear.inputs for linear in self.linears() if not linear.stays_float))

    def tensors(self) -> Iterator[TensorShape]:
        """Every tensor of the model by name, in the order of a checkpoint; a tied head is left out."""
        if self.transformers is not None:
            yield from self.transformers.parameters
            return
        yield LinearShape("model.embed_tokens", self.vocab_size, self.hidden_size)
        if self.per_layer_inputs is not None:
            yield from within("model.", self.per_layer_inputs.tensors(self.hidden_size, self.num_layers))
        for index, layer in enumerate(self.layers):
            yield from within(f"model.layers.{index}.", layer.tensors(self.hidden_size))
        yield VectorShape("model.norm.weight", self.hidden_size)
        if not self.tie_word_embeddings:
            yield LinearShape("lm_head", self.vocab_size, self.hidden_size)

    def linears(self) -> Iterator[LinearShape]:
        """Every linear layer but the head; none of a model that runs through transformers, which keeps them as they are."""
        if self.transformers is not None:
            return
        for index, layer in enumerate(self.layers):
            for tensor in within(f"model.layers.{index}.", layer.tensors(self.hidden_size)):
                if isinstance(tensor, LinearShape):
                    yield tensor

    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        return sum(tensor.num_parameters for tensor in self.tensors())

    def num_parameters_per_token(self) -> int:
        """Weights that one token meets: of a mixture of experts, the chosen ones; of the embedding, none but the head's."""
        total = self.num_parameters()
        for layer in self.layers:
            mixture = layer.mlp if isinstance(layer.mlp, MoE) else layer.experts
            if mixture is not None:
                expert = sum(tensor.num_parameters for tensor in mixture.expert.tensors(self.hidden_size))
                total -= (mixture.num_experts - mixture.top_k) * expert
        if self.per_layer_inputs is not None:
            total -= self.per_layer_inputs.vocab_size * self.per_layer_inputs.size * self.num_layers
        return total if self.tie_word_embeddings else total - self.vocab_size * self.hidden_size


def check_model_device(config: ModelConfig, device: str, capability: tuple[int, int] | None = None) -> None:
    """Raise `ConfigError` for a model with layers that there are no kernels for on `device`.

    `capability`: the least compute capability of the GPUs, None where it is not known.
    """
    if device == "cpu":
        return
    problem = ""
    is_latent = any(isinstance(spec, LatentKV) for spec in config.kv_specs)
    what, most = ("latents", MAX_GPU_LATENT_DIM) if is_latent else ("heads", MAX_GPU_HEAD_DIM)
    if any(isinstance(spec, SharedKV) for spec in config.kv_specs):
        problem = "layers that read what others keep, which runs on a CPU only in this version"
    elif config.head_dim > most:
        problem = f"{what} of {config.head_dim}, with {most} as the most, which runs on a CPU only in this version"
    elif is_latent and capability is not None and capability < LATENT_CAPABILITY:
        least, own = (".".join(map(str, each)) for each in (LATENT_CAPABILITY, capability))
        problem = f"multi-head latent attention, which takes a GPU of capability {least} or later; this one has {own}"
    if problem:
        raise ConfigError(f"device={device}: {config.architecture} has {problem}; use device=cpu")


def longest_context(layers: tuple[LayerConfig, ...], max_position_embeddings: int) -> int:
    """The longest sequence that the positions of every layer are meant for."""
    ropes = {layer.attention.rope for layer in layers} - {None}
    return min(
        (rope.max_context_length(max_position_embeddings) for rope in ropes if rope is not None),
        default=max_position_embeddings,
    )


def check_attention(attention: AttentionConfig | MLAConfig, where: str) -> None:
    """Raise `CheckpointError` for numbers of heads and dimensions that do not go together."""
    head_dim, key = attention.rope_head_dim, "head_dim"
    if isinstance(attention, MLAConfig):
        key = "qk_rope_head_dim"
        if attention.kv_rank % 2:
            raise CheckpointError(f"{where}: kv_lora_rank={attention.kv_rank} is odd; it must be even")
    if attention.num_heads % attention.num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads={attention.num_heads} is not a multiple of "
            f"num_key_value_heads={attention.num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{where}: {key}={head_dim} is odd; rotary embedding needs pairs")
    rope = attention.rope
    if rope is None:
        return
    rotary_dim = rope.rotary_dim(head_dim)
    if rotary_dim % 2 or not rotary_dim:
        raise CheckpointError(
            f"{where}: partial_rotary_factor={rope.partial_rotary_factor:g} of {key}={head_dim} makes "
            f"{rotary_dim} dimensions; rotary embedding needs pairs"
        )
    if rope.rope_type == "dynamic" and rotary_dim == 2:
        raise CheckpointError(f"{where}: {key}=2 is too small for rope type 'dynamic', which needs 4 at least")
    if rope.rope_type == "longrope":
        for key, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if len(factors) != rotary_dim // 2:
                raise CheckpointError(
                    f"{where}: {key} has {len(factors)} numbers; {rotary_dim} rotated dimensions need {rotary_dim // 2}"
                )
        if rope.original_max_position_embeddings < 2:
            raise CheckpointError(f"{where}: rope type 'longrope' needs original_max_position_embeddings of at least 2")


def check_delta_net(layer: DeltaNetConfig, where: str) -> None:
    """Raise `CheckpointError` for numbers of heads that do not go together."""
    if layer.num_heads % layer.num_kv_heads:
        raise CheckpointError(
            f"{where}: linear_num_value_heads={layer.num_heads} is not a multiple of "
            f"linear_num_key_heads={layer.num_kv_heads}"
        )


def _eos_token_ids(generation: ConfigReader, config: ConfigReader) -> tuple[int, ...]:
    named_by_generation = generation.values.get("eos_token_id") not in (None, [])
    return (generation if named_by_generation else config).token_ids("eos_token_id")


def _common_values(reader: ConfigReader) -> dict[str, Any]:
    """The fields that all families spell alike; defaults are those of transformers' configuration classes."""
    dtype = reader.string("dtype", reader.string("torch_dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{reader.where}: dtype {shown(dtype)} is not supported; supported: {', '.join(DTYPES)}")
    return {
        "vocab_size": reader.integer("vocab_size", high=MAX_VOCAB_SIZE),
        "hidden_size": reader.integer("hidden_size", high=MAX_HIDDEN_SIZE),
        "norm": NormConfig(eps=reader.number("rms_norm_eps", 1e-6, high=1.0)),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
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
