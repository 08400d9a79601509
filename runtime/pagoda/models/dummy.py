"""Small checkpoints with random weights, made on the spot: for tests and for trying out.

A checkpoint is what Hugging Face transformers would read: config.json, generation_config.json, tokenizer and safetensors, one
file or several shards. Equal specifications give equal bytes. Written with numpy and safetensors alone; torch is not needed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pagoda.errors import CheckpointError
from pagoda.models.config import ModelConfig
from pagoda.models.dummy_tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    TURN_END,
    write_tokenizer,
)
from pagoda.models.layer_config import ConvShape, VectorShape

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]

_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_QWEN3 = ("qwen3", "qwen3_moe")
# The name of a dtype in safetensors, and its size in bytes.
_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DummySpec:
    """What a checkpoint is to look like.

    `init_std`: standard deviation of all matrices; None: 1/sqrt(columns), which keeps activations near 1 and logits apart.
    `rope_scaling`: the entry of config.json, such as `{"rope_type": "linear", "factor": 2.0}`. `sliding_window`: tokens;
    Qwen uses it from layer `max_window_layers` on, Mistral in every layer. `attention_bias` is for llama and qwen3 (qwen2
    always has biases at q, k and v). qwen3_moe has `num_experts` of `moe_intermediate_size` units, and none of the other MLP;
    each token goes to `num_experts_per_tok` of them. `add_bos`: None means that llama and mistral do. `generation_config`:
    further entries.
    """

    family: Family = "qwen3"
    hidden_size: int = 64
    intermediate_size: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 512
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None
    max_window_layers: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    init_std: float | None = None
    seed: int = 0
    num_shards: int = 1
    add_bos: bool | None = None
    chat_template: bool = True
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in _ARCHITECTURES:
            raise CheckpointError(f"family={self.family!r}: must be one of {', '.join(_ARCHITECTURES)}")
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"dtype={self.dtype!r}: must be one of {', '.join(_DTYPES)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise CheckpointError(f"vocab_size={self.vocab_size} must be at least {SMALLEST_VOCABULARY}: all bytes")
        if self.family == "qwen2" and self.head_dim * self.num_heads != self.hidden_size:
            raise CheckpointError(
                f"qwen2 has hidden_size = num_heads * head_dim, not {self.hidden_size} and {self.num_heads} * {self.head_dim}"
            )
        if self.attention_bias and self.family not in ("llama", *_QWEN3):
            raise CheckpointError(f"attention_bias is for llama and qwen3, not {self.family}")
        if self.sliding_window is not None and self.family in ("llama", "qwen3_moe"):
            raise CheckpointError(f"{self.family} has no sliding window here")

    @property
    def uses_bos(self) -> bool:
        """Whether encoded texts begin with a token of their own."""
        return self.family in ("llama", "mistral") if self.add_bos is None else self.add_bos


def write_dummy_checkpoint(directory: Path | str, spec: DummySpec | None = None, *, weights: bool = True) -> Path:
    """Write the checkpoint and return its directory, which appears whole or not at all.

    Without `weights` it has everything else: enough for `load_format=dummy`.

    Raises:
        CheckpointError: the directory exists already or cannot be written.
    """
    target, spec = Path(directory), spec or DummySpec()
    if target.exists():
        raise CheckpointError(f"{target} exists already")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write_files(building, spec)
            if weights:
                _write_weights(building, spec)
            building.chmod(0o755)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        if not target.is_dir():  # else another process was first, with the same files
            raise CheckpointError(f"{target} cannot be written: {error}") from error
    return target


def _write_files(directory: Path, spec: DummySpec) -> None:
    _write_json(directory / "config.json", _model_config(spec))
    _write_json(directory / "generation_config.json", _token_ids(spec) | dict(spec.generation_config))
    write_tokenizer(
        directory,
        vocab_size=spec.vocab_size,
        qwen_words=spec.family in ("qwen2", *_QWEN3),
        add_bos=spec.uses_bos,
        chat_template=spec.chat_template,
        max_length=spec.max_position_embeddings,
    )


def _token_ids(spec: DummySpec) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return {
        "bos_token_id": ids[BEGIN_OF_TEXT] if spec.uses_bos else None,
        "eos_token_id": [ids[TURN_END], ids[END_OF_TEXT]],
        "pad_token_id": ids[END_OF_TEXT],
    }


def _model_config(spec: DummySpec) -> dict[str, Any]:
    """config.json in the form that published checkpoints have."""
    config = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else dict(spec.rope_scaling),
        "torch_dtype": spec.dtype,
        "use_cache": True,
        **_token_ids(spec),
    }
    if spec.family in ("llama", *_QWEN3):
        config["attention_bias"] = spec.attention_bias
    if spec.family != "llama":
        config["sliding_window"] = spec.sliding_window
    if spec.family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = spec.sliding_window is not None
        config["max_window_layers"] = spec.max_window_layers
    if spec.family == "qwen3_moe":
        config |= {
            "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.num_experts_per_tok,
            "moe_intermediate_size": spec.moe_intermediate_size,
            "norm_topk_prob": True,
        }
    return config


def tensor_shapes(spec: DummySpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint, in the order of the layers."""
    config = ModelConfig.from_dicts(_model_config(spec))
    for tensor in config.tensors():
        if isinstance(tensor, VectorShape):
            yield tensor.name, (tensor.size,)
            continue
        if isinstance(tensor, ConvShape):
            yield tensor.name, (tensor.channels, 1, tensor.size)
            continue
        yield f"{tensor.name}.weight", (tensor.outputs, tensor.inputs)
        if tensor.bias:
            yield f"{tensor.name}.bias", (tensor.outputs,)


def _write_weights(directory: Path, spec: DummySpec) -> None:
    shards = _shards(spec)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(directory / file_name, shard, spec)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name, _ in shard}
        total_size = sum(_size_in_bytes(shape, spec) for _, shape in tensor_shapes(spec))
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], spec: DummySpec) -> None:
    """One safetensors file, tensor by tensor, so that no more than one is in memory.

    The format: eight bytes with the header's length, the header as JSON, then the data without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + _size_in_bytes(shape, spec)
        header[name] = {"dtype": _DTYPES[spec.dtype][0], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of eight
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors:
            file.write(_tensor_bytes(name, shape, spec))


def _size_in_bytes(shape: tuple[int, ...], spec: DummySpec) -> int:
    return math.prod(shape) * _DTYPES[spec.dtype][1]


def _shards(spec: DummySpec) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in `num_shards` runs of about the same size; none is empty."""
    tensors = list(tensor_shapes(spec))
    if not 1 <= spec.num_shards <= len(tensors):
        raise CheckpointError(
            f"num_shards={spec.num_shards} must be between 1 and {len(tensors)}, the number of tensors"
        )
    total = sum(math.prod(shape) for _, shape in tensors)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for position, (name, shape) in enumerate(tensors):
        shards_left, tensors_left = spec.num_shards - len(shards), len(tensors) - position
        full = filled >= total * len(shards) / spec.num_shards or tensors_left <= shards_left
        if shards[-1] and shards_left and full:
            shards.append([])
        shards[-1].append((name, shape))
        filled += math.prod(shape)
    return shards


def _tensor_bytes(name: str, shape: tuple[int, ...], spec: DummySpec) -> bytes:
    """Random values of one tensor, little-endian; they depend on the seed and the tensor's name alone."""
    generator = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        values = 1.0 + 0.1 * values  # near one, but not one: a norm that is left out shows
    else:
        values *= 1 / math.sqrt(shape[-1]) if spec.init_std is None else spec.init_std
    if spec.dtype == "bfloat16":
        return _bfloat16_bits(values).tobytes()
    return values.astype(np.dtype(spec.dtype).newbyteorder("<")).tobytes()


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to the nearest, ties to even; numpy has no bfloat16."""
    bits = values.astype(np.dtype("<f4")).view(np.dtype("<u4"))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.dtype("<u2"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
