"""What a checkpoint makes of its hidden states: pooling, the layers behind it, labels. Imports no torch.

modules.json of Sentence Transformers     Transformer ─▶ Pooling ─▶ Dense … ─▶ Normalize
…ForSequenceClassification                first, last or mean token ─▶ dense ─▶ classifier ─▶ sigmoid or softmax
…ForTokenClassification                   every token ─▶ classifier
a language model that scores              last token ─▶ logits of two tokens ─▶ softmax
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.checkpoint_files import checkpoint_file, has_file, read_json_object, read_text, shown
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.config_reader import ConfigReader
from pagoda.models.encoders.config import EncoderConfig, labels_of, read_encoder
from pagoda.models.encoders.families import encoder_family
from pagoda.pooling.params import CLASSIFY, EMBED, SCORE, TOKEN_CLASSIFY, TOKEN_EMBED

MODULES_FILE = "modules.json"
SENTENCE_BERT_FILE = "sentence_bert_config.json"
GENERATE = "generate"

# By their names in 1_Pooling/config.json, and in vLLM's pooler config. Several stand side by side in this order, which is
# that of Sentence Transformers.
POOLING_MODES = {
    "cls_token": "cls",
    "cls": "cls",
    "max_tokens": "max",
    "max": "max",
    "mean_tokens": "mean",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "mean_sqrt_len": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
    "last": "last",
}
ACTIVATIONS = ("tanh", "relu", "gelu", "sigmoid", "silu", "identity")
_MAX_MODULES = 32
_MAX_MODULES_BYTES = 1 << 20
_MAX_HEAD_SIZE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayer:
    """A layer behind the pooling. `kind`: dense, layer_norm or normalize.

    `names`: what the tensors may be called, without `.weight`; `directory`: of their file, within the checkpoint's.
    """

    kind: str
    names: tuple[str, ...] = ()
    directory: str = ""
    outputs: int = 0
    has_bias: bool = True
    activation: str = "identity"
    eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerConfig:
    """What is made of the hidden states of a prompt.

    `tasks`: of requests that it can do, the first is the usual one. `modes`: how tokens become a vector, several side by side.
    `layers`: what follows. `normalizes`: the vector is scaled to length 1. `activation`: of a classifier's logits: sigmoid,
    softmax or identity. `labels`: of its outputs. `score_tokens`: the tokens whose logits are the outputs, instead of layers.
    `size`: numbers of an output. `dimensions`: lengths that vectors may be cut to, empty: any. `max_seq_length`: tokens of the
    longest text, where the checkpoint says so.
    """

    tasks: tuple[str, ...]
    modes: tuple[str, ...]
    layers: tuple[HeadLayer, ...] = ()
    normalizes: bool = False
    activation: str = "identity"
    labels: tuple[str, ...] = ()
    score_tokens: tuple[str, ...] = ()
    size: int
    dimensions: tuple[int, ...] = ()
    max_seq_length: int | None = None

    @property
    def needs_every_token(self) -> bool:
        """Whether more than the last token's hidden state is read."""
        return self.modes != ("last",)


def read_model(
    directory: str | Path, *, generation: bool = True, task: str = "auto", model_impl: str = "pagoda"
) -> ModelConfig | EncoderConfig:
    """The model in `directory`, a decoder, by `model_impl` (`family_of`), or an encoder. Raises `CheckpointError`.

    `task`: the setting. A decoder that embeds or classifies needs no language model head, and is stored without.
    """
    path = Path(directory)
    if values := _config_values(path):
        family = encoder_family(values)
        if family is not None:
            return read_encoder(family, values, path / CONFIG_FILE)
        base = _without_head(values, embeds=task == EMBED or (task == "auto" and _has(path, MODULES_FILE)))
        if base is not None:
            return ModelConfig.from_dicts(base, where=str(path / CONFIG_FILE))
    return ModelConfig.from_directory(path, generation=generation, model_impl=model_impl)


def read_pooler(config: PagodaConfig, directory: str | Path, model: ModelConfig | EncoderConfig) -> PoolerConfig | None:
    """How the model in `directory` pools, by `task` and `pooler_config`; None if it generates.

    Raises `ConfigError` for a task that the model cannot do, and `CheckpointError` for files that cannot be used.
    """
    path = Path(directory)
    reader = ConfigReader(_config_values(path), str(path / CONFIG_FILE))
    architecture = (reader.strings("architectures") or ("",))[0]
    task: str = config.task
    is_encoder = isinstance(model, EncoderConfig)
    if architecture.endswith(("ForSequenceClassification", "ForTokenClassification")) and task != EMBED:
        if task == GENERATE:
            raise ConfigError(f"task=generate: {architecture} has no language model head; it classifies")
        return _overridden(_classifier(reader, model, architecture), config.pooler_config)
    if task == "auto":
        task = EMBED if is_encoder or _has(path, MODULES_FILE) else GENERATE
    if task == GENERATE:
        if is_encoder:
            raise ConfigError(f"task=generate: {architecture or model.architecture} is an encoder; it can embed")
        return None
    if task == EMBED:
        return _overridden(_embedder(path, reader, model), config.pooler_config)
    if is_encoder or task == CLASSIFY:
        raise ConfigError(
            f"task={task}: {architecture or model.architecture} has no classifier; the checkpoint must be of a "
            "…ForSequenceClassification"
        )
    tokens = (config.pooler_config or {}).get("classifier_from_token", ["no", "yes"])
    if (
        not isinstance(tokens, list)
        or len(tokens) != 2
        or not all(isinstance(token, str) and token for token in tokens)
    ):
        raise ConfigError("pooler_config: classifier_from_token must be two tokens, the second of which is what scores")
    return PoolerConfig(
        tasks=(SCORE, CLASSIFY),
        modes=("last",),
        activation="softmax",
        labels=tuple(tokens),
        score_tokens=tuple(tokens),
        size=2,
    )


def check_pooling(config: PagodaConfig, model: ModelConfig | EncoderConfig) -> None:
    """Raise `ConfigError` for settings that make no sense for a model that pools."""
    problems = []
    if config.speculative_config is not None:
        problems.append("speculative_config: a model that pools generates no tokens to draft")
    if config.num_scheduler_steps > 1:
        problems.append("num_scheduler_steps: a model that pools generates no tokens; leave it at 1")
    if isinstance(model, EncoderConfig):
        ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        if ranks > 1:
            problems.append("tensor_parallel_size, pipeline_parallel_size: an encoder runs on one rank; use replicas")
        if config.enable_lora:
            problems.append("enable_lora: adapters of encoders are not served")
        if config.load_format == "dummy":
            problems.append("load_format=dummy: not supported for encoders")
        if config.quantization not in (None, "int8"):
            problems.append(f"quantization={config.quantization}: encoders may have int8 weights")
    if problems:
        raise ConfigError("\n".join(problems))


def token_ids_of(tokens: Sequence[str], directory: str | Path) -> list[int]:
    """The ids of these entries of the vocabulary. Raises `ConfigError` for one that it does not have."""
    if not tokens:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_file(Path(directory), "tokenizer.json")))
    found = {token: tokenizer.token_to_id(token) for token in tokens}
    missing = [token for token, token_id in found.items() if token_id is None]
    if missing:
        raise ConfigError(
            f"pooler_config: {shown(missing[0])} is no token of this model; give two of its tokens as classifier_from_token"
        )
    return [token_id for token_id in found.values() if token_id is not None]


def _has(path: Path, name: str) -> bool:
    return path.is_dir() and has_file(path, name)


def _config_values(path: Path) -> dict[str, Any]:
    """config.json; empty where there is none, as beside a GGUF file, which has it all in itself."""
    return read_json_object(path, CONFIG_FILE) if _has(path, CONFIG_FILE) else {}


def _without_head(values: Mapping[str, Any], *, embeds: bool) -> dict[str, Any] | None:
    """config.json of a decoder that is stored without a language model head; None for any other.

    It says that the head is tied to the embedding, so that none is looked for.
    """
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return None
    base = architectures[0].removesuffix("ForSequenceClassification")
    if base != architectures[0]:
        return {**values, "architectures": [f"{base}ForCausalLM"], "tie_word_embeddings": True}
    return {**values, "tie_word_embeddings": True} if embeds and "For" not in base else None


# ---- embedding models -------------------------------------------------------------------------------------------------


def _embedder(path: Path, reader: ConfigReader, model: ModelConfig | EncoderConfig) -> PoolerConfig:
    dimensions = reader.values.get("matryoshka_dimensions") or ()
    if not isinstance(dimensions, list | tuple) or not all(type(size) is int and size > 0 for size in dimensions):
        raise reader.error("matryoshka_dimensions", "a list of integers")
    is_encoder = isinstance(model, EncoderConfig)
    pooler = PoolerConfig(
        tasks=(EMBED, TOKEN_EMBED),
        # What Sentence Transformers does with a model that says nothing, and vLLM with a decoder.
        modes=("mean",) if is_encoder else ("last",),
        normalizes=not is_encoder,
        size=model.hidden_size,
        dimensions=tuple(dimensions),
    )
    if _has(path, SENTENCE_BERT_FILE):
        sentence = ConfigReader(read_json_object(path, SENTENCE_BERT_FILE), str(path / SENTENCE_BERT_FILE))
        pooler = replace(pooler, max_seq_length=sentence.optional_integer("max_seq_length"))
    return _with_modules(path, pooler, model.hidden_size) if _has(path, MODULES_FILE) else pooler


def _with_modules(path: Path, pooler: PoolerConfig, hidden_size: int) -> PoolerConfig:
    modes: tuple[str, ...] | None = None
    layers: list[HeadLayer] = []
    size = hidden_size
    for kind, directory in _modules(path):
        where = path / directory
        if kind in ("Transformer", "Dropout"):
            continue
        if kind == "Normalize":
            layers.append(HeadLayer(kind="normalize"))
            continue
        reader = ConfigReader(read_json_object(where, CONFIG_FILE), str(where / CONFIG_FILE))
        if kind == "Pooling":
            modes = _pooling_modes(reader)
            size = hidden_size * len(modes)
        elif kind == "Dense":
            inputs = reader.integer("in_features", high=_MAX_HEAD_SIZE)
            outputs = reader.integer("out_features", high=_MAX_HEAD_SIZE)
            if inputs != size:
                raise CheckpointError(f"{reader.where}: in_features={inputs}, and {size} numbers come in")
            layers.append(
                HeadLayer(
                    kind="dense",
                    names=("linear",),
                    directory=directory,
                    outputs=outputs,
                    has_bias=reader.flag("bias", True),
                    activation=_activation(reader.string("activation_function", "torch.nn.Tanh"), reader.where),
                )
            )
            size = outputs
        else:  # LayerNorm, the only other one
            layers.append(HeadLayer(kind="layer_norm", names=("norm",), directory=directory, outputs=size))
    normalizes = bool(layers) and layers[-1].kind == "normalize"
    return replace(
        pooler,
        modes=modes or pooler.modes,
        layers=tuple(layers[:-1] if normalizes else layers),
        normalizes=normalizes,
        size=size,
    )


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order."""
    text = read_text(path, MODULES_FILE, _MAX_MODULES_BYTES)
    try:
        modules = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path / MODULES_FILE} is not JSON") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path / MODULES_FILE} must be a list of modules")
    if len(modules) > _MAX_MODULES:
        raise CheckpointError(f"{path / MODULES_FILE} has {len(modules)} modules; at most {_MAX_MODULES} are supported")
    found = []
    for module in modules:
        reader = ConfigReader(module, str(path / MODULES_FILE))
        name, directory = reader.string("type"), module.get("path") or ""
        kind = name.rpartition(".")[2]
        known = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
        if not name.startswith("sentence_transformers.") or kind not in known:
            raise CheckpointError(
                f"{path / MODULES_FILE}: module {shown(name)} is not supported; supported: {', '.join(known)} of "
                "sentence_transformers"
            )
        if not isinstance(directory, str):
            raise reader.error("path", "a string")
        if directory and kind not in ("Transformer", "Normalize", "Dropout"):
            checkpoint_file(path / directory, CONFIG_FILE)
        found.append((kind, directory))
    return found


def _pooling_modes(reader: ConfigReader) -> tuple[str, ...]:
    named = reader.values.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) and name in POOLING_MODES for name in names):
            raise reader.error("pooling_mode", f"one or several of {', '.join(dict.fromkeys(POOLING_MODES.values()))}")
        return tuple(POOLING_MODES[name] for name in names)
    modes = tuple(mode for name, mode in POOLING_MODES.items() if reader.values.get(f"pooling_mode_{name}") is True)
    unknown = [
        name
        for name, value in reader.values.items()
        if name.startswith("pooling_mode_")
        and value is True
        and name.removeprefix("pooling_mode_") not in POOLING_MODES
    ]
    if unknown:
        raise CheckpointError(f"{reader.where}: {shown(unknown[0])} is not supported")
    return modes or ("mean",)


def _activation(name: str, where: str) -> str:
    kind = name.rpartition(".")[2].lower()
    if kind not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: activation {shown(name)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return kind


# ---- classifiers ------------------------------------------------------------------------------------------------------


def _classifier(reader: ConfigReader, model: ModelConfig | EncoderConfig, architecture: str) -> PoolerConfig:
    labels = labels_of(reader.values)
    of_tokens = architecture.endswith("ForTokenClassification")
    modes, layers = _head_of(reader, model, len(labels), of_tokens=of_tokens)
    problem = reader.string("problem_type", "none")
    activation = "sigmoid" if len(labels) == 1 or problem == "multi_label_classification" else "softmax"
    if problem == "regression":
        activation = "identity"
    named = reader.mapping("sentence_transformers").get("activation_fn") or reader.values.get(
        "sbert_ce_default_activation_function"
    )
    if isinstance(named, str) and len(labels) == 1:
        activation = _activation(named, reader.where)
    tasks: tuple[str, ...] = (TOKEN_CLASSIFY,) if of_tokens else (CLASSIFY,)
    if len(labels) == 1 and not of_tokens:
        tasks = (SCORE, CLASSIFY)
    return PoolerConfig(tasks=tasks, modes=modes, layers=layers, activation=activation, labels=labels, size=len(labels))


def _head_of(
    reader: ConfigReader, model: ModelConfig | EncoderConfig, num_labels: int, *, of_tokens: bool
) -> tuple[tuple[str, ...], tuple[HeadLayer, ...]]:
    """The pooling and the layers of a family's classifier."""
    hidden = model.hidden_size

    def dense(*names: str, outputs: int = hidden, activation: str = "identity", has_bias: bool = True) -> HeadLayer:
        return HeadLayer(kind="dense", names=names, outputs=outputs, activation=activation, has_bias=has_bias)

    if isinstance(model, ModelConfig):
        return ("last",), (dense("score", outputs=num_labels, has_bias=False),)
    classifier = dense("classifier", outputs=num_labels)
    if model.model_type == "modernbert":
        head = dense(
            "head.dense",
            activation=_activation(reader.string("classifier_activation", "gelu"), reader.where),
            has_bias=reader.flag("classifier_bias", False),
        )
        norm = HeadLayer(
            kind="layer_norm",
            names=("head.norm",),
            outputs=hidden,
            has_bias=model.norm_bias,
            eps=model.norm_eps,
        )
        mode = reader.string("classifier_pooling", "cls")
        if mode not in ("cls", "mean"):
            raise reader.error("classifier_pooling", "cls or mean")
        return (mode,), (head, norm, classifier)
    if of_tokens:
        return ("cls",), (classifier,)
    if model.model_type == "distilbert":
        return ("cls",), (dense("pre_classifier", activation="relu"), classifier)
    if model.model_type in ("roberta", "mpnet"):
        return ("cls",), (
            dense("classifier.dense", activation="tanh"),
            dense("classifier.out_proj", outputs=num_labels),
        )
    prefixes = model.names.prefixes
    return ("cls",), (dense(*(f"{prefix}pooler.dense" for prefix in prefixes), activation="tanh"), classifier)


def _overridden(pooler: PoolerConfig, given: Mapping[str, Any] | None) -> PoolerConfig:
    """The pooler with what `pooler_config` says in vLLM's words."""
    changes: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if name in ("pooling_type", "seq_pooling_type"):
            mode = POOLING_MODES.get(str(value).lower())
            if mode is None:
                raise ConfigError(
                    f"pooler_config: {name} must be one of {', '.join(dict.fromkeys(POOLING_MODES.values()))}, "
                    f"got {shown(value)}"
                )
            changes["modes"] = (mode,)
        elif name == "normalize" and isinstance(value, bool):
            changes["normalizes"] = value
        elif name in ("use_activation", "activation", "softmax") and value is False:
            changes["activation"] = "identity"
        elif name == "matryoshka_dimensions" and isinstance(value, list):
            changes["dimensions"] = tuple(value)
        elif name not in ("classifier_from_token", "use_activation", "activation"):
            raise ConfigError(
                f"pooler_config: {shown(name)} is not known, or its value is not; known are pooling_type, normalize, "
                "use_activation, matryoshka_dimensions and classifier_from_token"
            )
    if changes.get("modes") and pooler.layers and len(pooler.modes) != 1:
        raise ConfigError("pooler_config: pooling_type cannot replace several modes that a layer behind them reads")
    return replace(pooler, **changes)
