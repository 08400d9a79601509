"""What a PEFT checkpoint of a LoRA adapter holds, and whether it fits a model. Imports neither torch nor safetensors.

    adapter_config.json          r, lora_alpha, use_rslora, rank_pattern, alpha_pattern
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [rank, inputs]
                                 base_model.model.<layer>.lora_B.weight [outputs, rank]

An adapter adds `scale * B @ A` to the weight of a layer, where scale is alpha / rank, or alpha / sqrt(rank) with rslora
(Kalajdzievski, 2023). Where a checkpoint of the model keeps several layers as one (Phi-3's qkv_proj), so does its adapter:
each has the whole A, and its own rows of B.

Experts are layers of their own (`experts.3.up_proj`), or, where transformers keeps those of all experts in one parameter,
PEFT's `target_parameters`:

    <mlp>.experts.lora_A.weight            [experts * rank, inputs]     of the last of them that has an adapter
    <mlp>.experts.lora_B.weight            [outputs, rank * experts]    the expert is what changes from column to column
    <mlp>.experts.base_layer.lora_A.…      of the one before it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import (
    checkpoint_file,
    has_file,
    read_file,
    read_json_object,
    shown,
    shown_name,
    shown_reason,
)
from pagoda.models.checkpoint_names import STACKED_EXPERTS, StackedExperts
from pagoda.models.config import ModelConfig
from pagoda.models.config_reader import ConfigReader
from pagoda.models.layer_config import LinearShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MATCH_SECONDS = 1.0

_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"
_EXPERT = re.compile(r"\b(layers\.\d+\.).*\bexperts\.(\d+)\.(\w+)$")
_FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_CHUNK_BYTES = 1 << 20

# The kinds of layers that adapters are served for.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Settings of PEFT that change what is computed, or what must be loaded, in a way that is not served; each with its reason.
_REFUSED = {
    "use_dora": "DoRA adapters are not served",
    "modules_to_save": "whole layers beside the adapter (modules_to_save) are not served",
    "trainable_token_indices": "adapters of embeddings (trainable_token_indices) are not served",
    "layer_replication": "models of replicated layers (layer_replication) are not served",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) is not served",
    "lora_bias": "biases of adapters (lora_bias) are not served",
    "use_qalora": "QALoRA adapters are not served",
}
# Initial weights that were taken out of the base model, which then has others.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """The adapter of one of the model's linear layers.

    `a`, `b`: names of its tensors in the file. `first_row`, `row_step`: of B, where the layer's outputs are in it. `rank` is
    that of both, `scale` what their product is multiplied by. `expert`: which one of `num_experts` it is whose tensors are
    stacked.
    """

    a: str
    b: str
    first_row: int
    rank: int
    scale: float
    row_step: int = 1
    expert: int = 0
    num_experts: int = 1


@dataclass(frozen=True, slots=True)
class LoraCheckpoint:
    """An adapter that fits a model: of each linear layer that it has something for, by the model's name, its tensors."""

    file: Path
    layers: Mapping[str, LoraTensors]

    @property
    def max_rank(self) -> int:
        """The greatest rank of a layer."""
        return max(tensors.rank for tensors in self.layers.values())


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor by its name in the file."""

    name: str
    shape: tuple[int, ...]


def adaptable(layer: str) -> bool:
    """Whether adapters are served for the model's linear layer of that name."""
    return layer.rpartition(".")[2] in KINDS


def read_version(directory: Path) -> str:
    """The digest of an adapter's files, for `LoraAdapter.version`. Raises `CheckpointError` where one cannot be read."""
    digest = hashlib.sha256(read_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES))
    for chunk in _chunks(_weights_file(directory)):
        digest.update(chunk)
    return digest.hexdigest()


def read_weights(directory: Path) -> tuple[str, bytes]:
    """The same, and the file of weights whole, read once: what it holds is of that version, whoever writes to it meanwhile.

    Not mapped: a process that reads a mapped file which somebody cuts off is killed.
    """
    digest = hashlib.sha256(read_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES))
    content = b"".join(_chunks(_weights_file(directory)))
    digest.update(content)
    return digest.hexdigest(), content


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def read_adapter(directory: Path, model: ModelConfig, max_lora_rank: int) -> LoraCheckpoint:
    """The adapter in `directory`, from its configuration and the header of its weights.

    Raises `CheckpointError`: a file that is missing or not whole, a kind of adapter that is not served, a layer that the model
    does not have or has in other sizes, or a rank above `max_lora_rank`.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no directory: a LoRA adapter is one with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = ConfigReader(
        read_json_object(directory, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES), str(directory / CONFIG_FILE)
    )
    _check_kind(config)
    file = _weights_file(directory)
    layers = _Layers(model, config, file, max_lora_rank).read(_header(file))
    return LoraCheckpoint(file, layers)


def _weights_file(directory: Path) -> Path:
    if not has_file(directory, WEIGHTS_FILE) and has_file(directory, "adapter_model.bin"):
        raise CheckpointError(
            f"{directory} has its weights in adapter_model.bin: save the adapter with safetensors, as {WEIGHTS_FILE}"
        )
    return checkpoint_file(directory, WEIGHTS_FILE)


def _check_kind(config: ConfigReader) -> None:
    kind = config.string("peft_type")
    if kind.upper() != "LORA":
        raise CheckpointError(f"{config.where}: peft_type {shown(kind)} is not served; supported: LORA")
    for key, reason in _REFUSED.items():
        if config.values.get(key):
            raise CheckpointError(f"{config.where}: {reason}")
    if config.string("bias", "none") != "none":
        raise CheckpointError(f"{config.where}: bias={shown(config.values['bias'])}: biases of adapters are not served")
    initial = config.values.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{config.where}: init_lora_weights={shown(initial)} changes the base model's weights; convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )


def _header(file: Path) -> list[_Stored]:
    """The tensors in a safetensors file, which is as long as they say."""
    wrong = f"{file} is not a whole safetensors file"
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{wrong}: it names a header of {length} bytes, and has {size} in all")
            header = json.loads(opened.read(length))
        tensors, end = [], 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _FLOAT_BYTES:
                raise CheckpointError(
                    f"{file}: {shown_name(name)} is {shown(entry['dtype'])}; supported: {', '.join(_FLOAT_BYTES)}"
                )
            tensors.append(_Stored(name, tuple(int(each) for each in entry["shape"])))
            # By shapes, which are compared with the model's, and not by offsets: no more is read than the model takes.
            end += math.prod(max(0, size) for size in tensors[-1].shape) * _FLOAT_BYTES[entry["dtype"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{wrong}: {shown_reason(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{wrong}: it has {size} bytes, not {8 + length + end}")
    return tensors


class _Layers:
    """Finds for each tensor of an adapter the layers of the model that it is for."""

    def __init__(self, model: ModelConfig, config: ConfigReader, file: Path, max_lora_rank: int) -> None:
        self._names = model.names
        self._linears = {linear.name: linear for linear in model.linears()}
        # By the layer (`layers.3.`): of each expert its linear layers, by the last part of their names.
        self._experts: dict[str, dict[int, dict[str, LinearShape]]] = {}
        for name, linear in self._linears.items():
            if found := _EXPERT.search(name):
                members = self._experts.setdefault(found[1], {}).setdefault(int(found[2]), {})
                members[found[3]] = linear
        self._config = config
        self._file = file
        self._max_lora_rank = max_lora_rank
        self._scales = _Scales(config)

    def read(self, tensors: list[_Stored]) -> dict[str, LoraTensors]:
        pairs: dict[str, dict[str, _Stored]] = {}
        for tensor in tensors:
            module, which = self._split(tensor.name)
            pairs.setdefault(module, {})[which] = tensor
        if not pairs:
            raise CheckpointError(f"{self._file} holds no tensors")
        layers: dict[str, LoraTensors] = {}
        for module, pair in pairs.items():
            if len(pair) != 2:
                raise CheckpointError(f"{self._file}: {shown_name(module)} has lora_{next(iter(pair))} alone")
            is_stack = module.removesuffix(_BASE_LAYER).endswith(".experts")
            read = self._experts_of if is_stack else self._layers_of
            layers.update(read(module, pair["A"], pair["B"]))
        return layers

    def _split(self, name: str) -> tuple[str, str]:
        """A tensor's module, by its name in the base model, and whether it is A or B."""
        for which in ("A", "B"):
            suffix = f".lora_{which}.weight"
            if name.startswith(_PREFIX) and name.endswith(suffix):
                return name.removeprefix(_PREFIX).removesuffix(suffix), which
        for part, reason in (
            ("lora_embedding_", "adapters of embeddings are not served"),
            ("lora_magnitude_vector", "DoRA adapters are not served"),
            ("lora_B.bias", "biases of adapters are not served"),
        ):
            if part in name:
                raise CheckpointError(f"{self._file}: {shown_name(name)}: {reason}")
        raise CheckpointError(
            f"{self._file}: {shown_name(name)} is neither the lora_A nor the lora_B of a layer; whole weights beside an "
            "adapter are not served"
        )

    def _layers_of(self, module: str, a: _Stored, b: _Stored) -> dict[str, LoraTensors]:
        shapes = self._shapes_of(module)
        outputs, inputs = sum(shape.outputs for shape in shapes), shapes[0].inputs
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"{self._file}: {shown_name(module)} has A {list(a.shape)} and B {list(b.shape)}")
        rank = a.shape[0]
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            raise CheckpointError(
                f"{self._file}: the adapter of {shown_name(module)} is for {a.shape[1]} inputs and {b.shape[0]} outputs; this "
                f"model's layer has {inputs} and {outputs}{self._base()}"
            )
        rank, scale = self._rank_of(module, rank)
        layers, first_row = {}, 0
        for shape in shapes:
            layers[shape.name] = LoraTensors(a.name, b.name, first_row, rank, scale)
            first_row += shape.outputs
        return layers

    def _rank_of(self, module: str, rank: int) -> tuple[int, float]:
        """The rank of its tensors, which must be what the configuration says and what may be, and the scale."""
        expected, scale = self._scales.of(module)
        if rank != expected:
            raise CheckpointError(
                f"{self._file}: the adapter of {shown_name(module)} has rank {rank}; {CONFIG_FILE} says {expected}"
            )
        if rank > self._max_lora_rank:
            raise CheckpointError(
                f"{self._file}: the adapter of {shown_name(module)} has rank {rank}; max_lora_rank is {self._max_lora_rank}"
            )
        return rank, scale

    def _experts_of(self, module: str, a: _Stored, b: _Stored) -> dict[str, LoraTensors]:
        """The layers of all experts whose tensors are stacked."""
        stack = self._stack_of(module)
        layer = re.search(r"\blayers\.\d+\.", module)
        experts = self._experts.get(layer[0] if layer else "", {})
        if not experts:
            raise CheckpointError(f"{self._file}: {shown_name(module)}: this model has no experts there{self._base()}")
        shapes = [members[stack.members[0]] for members in experts.values()]
        count, inputs = len(experts), shapes[0].inputs
        outputs = len(stack.members) * shapes[0].outputs
        where = f"{self._file}: the adapter of {shown_name(module)} ({stack.name})"
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count:
            raise CheckpointError(
                f"{where} has A {list(a.shape)} and B {list(b.shape)}, which are not those of {count} experts"
            )
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            hint = ": save it with PEFT 0.18 or later" if (a.shape[1], b.shape[0]) == (outputs, inputs) else ""
            raise CheckpointError(
                f"{where} is for {a.shape[1]} inputs and {b.shape[0]} outputs; each expert of this model has {inputs} and "
                f"{outputs}{hint or self._base()}"
            )
        rank, scale = self._rank_of(f"{module.removesuffix(_BASE_LAYER)}.{stack.name}", a.shape[0] // count)
        layers = {}
        for expert, members in experts.items():
            for place, member in enumerate(stack.members):
                first_row, step = (place, len(stack.members)) if stack.interleaved else (place * shapes[0].outputs, 1)
                layers[members[member].name] = LoraTensors(
                    a.name, b.name, first_row, rank, scale, step, expert=expert, num_experts=count
                )
        return layers

    def _stack_of(self, module: str) -> StackedExperts:
        """Which of the parameters of `experts` an adapter's module is for: PEFT wraps them in the order that they have in the
        model, the last one outermost."""
        targets = self._config.values.get("target_parameters")
        named = [str(each) for each in targets] if isinstance(targets, list) else []
        stacks = [
            each
            for each in self._names.stacked or STACKED_EXPERTS
            if any(f".{target}".endswith((f".{each.name}", ".*")) for target in named)
        ]
        depth = 1 + module.endswith(_BASE_LAYER)
        if depth > len(stacks):
            expected = ", ".join(f"experts.{each.name}" for each in STACKED_EXPERTS)
            raise CheckpointError(
                f"{self._file}: {shown_name(module)} is an adapter of experts that are one parameter, but "
                f"target_parameters in {CONFIG_FILE} has {shown(named)}; expected: {expected}"
            )
        return stacks[-depth]

    def _shapes_of(self, module: str) -> list[LinearShape]:
        """The model's linear layers, in order, that the module of that name in its checkpoints is."""
        own = self._names.model_name(f"{module}.weight").removesuffix(".weight")
        parent, _, last = own.rpartition(".")
        members = dict(self._names.fused).get(last, (last,))
        for prefix in (f"{parent}.", f"model.{parent}.", f"{parent}.".removeprefix("model.")):
            names = [f"{prefix}{member}" for member in members]
            if all(name in self._linears for name in names):
                if not all(adaptable(name) for name in names):
                    raise CheckpointError(
                        f"{self._file}: {shown_name(module)}: adapters are served for {', '.join(KINDS)}"
                    )
                return [self._linears[name] for name in names]
        if last in ("lm_head", "embed_tokens"):
            raise CheckpointError(
                f"{self._file}: {shown_name(module)}: adapters of embeddings and heads are not served"
            )
        kinds = sorted({name.rpartition(".")[2] for name in self._linears})
        raise CheckpointError(
            f"{self._file}: this model has no layer {shown_name(module)}; its layers are of the kinds {', '.join(kinds)}"
            f"{self._base()}"
        )

    def _base(self) -> str:
        base = self._config.values.get("base_model_name_or_path")
        return f" (the adapter was made for {shown(base)})" if base else ""


class _Scales:
    """Rank and scale of each module, by the patterns that `adapter_config.json` has for them."""

    def __init__(self, config: ConfigReader) -> None:
        self._where = config.where
        self._rank = config.integer("r", 8, high=1 << 16)
        self._alpha = config.number("lora_alpha", 8.0, low_allowed=True)
        self._rslora = config.flag("use_rslora", False)
        self._ranks = self._patterns(config, "rank_pattern")
        self._alphas = self._patterns(config, "alpha_pattern")
        self._deadline = time.monotonic() + MATCH_SECONDS

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of the module."""
        rank = int(self._find(self._ranks, module, self._rank))
        alpha = self._find(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._rslora else rank)

    def _patterns(self, config: ConfigReader, key: str) -> dict[str, Any]:
        patterns = config.values.get(key) or {}
        values = patterns.values() if isinstance(patterns, dict) else [None]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each < 1e6 for each in values):
            raise config.error(key, "an object of numbers")
        if key == "rank_pattern" and not all(isinstance(each, int) and each > 0 for each in values):
            raise config.error(key, "an object of integers of at least 1")
        return dict(patterns)

    def _find(self, patterns: Mapping[str, Any], module: str, default: float) -> float:
        """The value of the first pattern that is the module's name, or the end of it, as PEFT matches it."""
        for pattern, value in patterns.items():
            left = self._deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=left):
                    return float(value)
            except TimeoutError:
                raise CheckpointError(
                    f"{self._where}: the patterns of ranks and alphas take longer than {MATCH_SECONDS:g} s to match; use "
                    "simpler ones"
                ) from None
            except regex.error as error:
                raise CheckpointError(f"{self._where}: {shown(pattern)} is no regular expression: {error}") from error
        return default
