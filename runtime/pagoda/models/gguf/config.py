"""config.json and generation_config.json, as the metadata of a GGUF file describes the model."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.gguf.architectures import (
    ROPE_FACTORS,
    ROPE_FACTORS_LONG,
    ROPE_FACTORS_SHORT,
    architecture_of,
    named_tensors,
)
from pagoda.models.gguf.ggml_types import F16, F32
from pagoda.models.gguf.reader import GgufArray, GgufFile
from pagoda.models.gguf.tokenizer import tokens_of

_MAX_ROPE_FACTORS = 1 << 12
# Llama 3's, which llama.cpp applies when it converts: all that is left of them in the file is their effect on each frequency.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Ends of generation, as llama.cpp takes them: those that are named, and special tokens of these texts.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset(
    {
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
        *("<end_of_turn>", "<|return|>", "<|call|>", "<｜end▁of▁sentence｜>", "<|endofprompt|>"),
    }
)
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(\w+)")
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def config_json(file: GgufFile) -> dict[str, Any]:
    """What config.json would hold. Raises `CheckpointError` for what is missing or not supported."""
    prefix, architecture = architecture_of(file)

    def integer(key: str, default: int | None = None) -> int:
        return file.value(f"{prefix}.{key}", int, default)

    tensors = {named.name: named for named in named_tensors(file)}
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} holds no token_embd.weight: it is no language model, or a part of one")
    hidden_size, heads, layers = integer("embedding_length"), integer("attention.head_count"), integer("block_count")
    if heads < 1:
        raise CheckpointError(f"{file.path}: {prefix}.attention.head_count is {heads}; it must be at least 1")
    rotated = integer("rope.dimension_count", 0)
    # Of a family that rotates a part of each head, that part is no size of the head.
    head_dim = integer(
        "attention.key_length", hidden_size // heads if prefix == "phi3" else rotated or hidden_size // heads
    )
    if (found := integer("attention.value_length", head_dim)) != head_dim:
        raise CheckpointError(
            f"{file.path}: {prefix}.attention.value_length is {found}; supported: the length of a key, {head_dim}"
        )
    if rotated not in (0, head_dim) and not (prefix == "phi3" and 0 < rotated < head_dim and rotated % 2 == 0):
        raise CheckpointError(
            f"{file.path}: {prefix}.rope.dimension_count is {rotated}; supported: the length of a key, {head_dim}"
        )
    names = set(tensors)
    return {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        "vocab_size": embedding.stored.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": file.value(f"{prefix}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(file, prefix, rotated or head_dim),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in names,
        "hidden_act": "silu",
        "dtype": _dtype(file),
        "bos_token_id": file.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": file.optional("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": file.optional("tokenizer.ggml.padding_token_id", int),
        **(_OF_FAMILY[prefix](file, prefix, head_dim) if prefix in _OF_FAMILY else {}),
    } | _quantization(tensors.values())


def _experts(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    """Qwen's. llama.cpp does not store whether weights are normalized: it does that for Qwen3's, and not for Qwen2's."""
    del head_dim
    return {
        "num_experts": file.value(f"{prefix}.expert_count", int),
        "num_experts_per_tok": file.value(f"{prefix}.expert_used_count", int),
        "moe_intermediate_size": file.value(f"{prefix}.expert_feed_forward_length", int),
        "shared_expert_intermediate_size": file.value(f"{prefix}.expert_shared_feed_forward_length", int, 0) or None,
        "norm_topk_prob": prefix == "qwen3moe",
    }


def _llama(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    """What Mixtral has besides."""
    del head_dim
    if not (num_experts := file.value(f"{prefix}.expert_count", int, 0)):
        return {}
    return {"num_local_experts": num_experts, "num_experts_per_tok": file.value(f"{prefix}.expert_used_count", int)}


def _gemma(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    layers, heads = file.value(f"{prefix}.block_count", int), file.value(f"{prefix}.attention.head_count", int)
    # Not stored: llama.cpp knows the models of 27 B parameters, whose scale is another one, by their number of layers.
    is_largest = layers == {"gemma2": 46, "gemma3": 62}[prefix]
    values: dict[str, Any] = {
        "query_pre_attn_scalar": file.value(f"{prefix}.embedding_length", int) // heads if is_largest else head_dim,
        "sliding_window": file.value(f"{prefix}.attention.sliding_window", int, 4096),
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": file.optional(f"{prefix}.attn_logit_softcapping", float),
        "final_logit_softcapping": file.optional(f"{prefix}.final_logit_softcapping", float),
    }
    if prefix == "gemma3":
        pattern = file.metadata.get(f"{prefix}.attention.sliding_window_pattern", 6)
        local = file.value(f"{prefix}.rope.freq_base_swa", float, 10000.0)
        values["layer_types"] = _layer_types(file, pattern, layers)
        values["rope_parameters"] = {
            "full_attention": _rope(file, prefix, head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return values


def _layer_types(file: GgufFile, pattern: object, layers: int) -> list[str]:
    """By a period, whose last layer sees all, or by what the file says of each layer."""
    if isinstance(pattern, GgufArray) and pattern.count == layers:
        slides = [bool(each) for each in pattern.numbers()]
    elif type(pattern) is int and pattern > 0 and layers < 1 << 16:
        slides = [bool((layer + 1) % pattern) for layer in range(layers)]
    else:
        raise CheckpointError(
            f"{file.path}: attention.sliding_window_pattern must be a period, or a value for each layer"
        )
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _phi3(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    rotated = file.value(f"{prefix}.rope.dimension_count", int, head_dim)
    values: dict[str, Any] = {"sliding_window": file.optional(f"{prefix}.attention.sliding_window", int) or None}
    if rotated != head_dim:
        values["partial_rotary_factor"] = rotated / head_dim
    if ROPE_FACTORS_LONG not in file.tensors:
        return values
    original = file.value(f"{prefix}.rope.scaling.original_context_length", int)
    attention = file.optional(f"{prefix}.rope.scaling.attn_factor", float)
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": file.value(f"{prefix}.rope.freq_base", float, 10000.0),
        "short_factor": _factors(file, ROPE_FACTORS_SHORT, rotated // 2),
        "long_factor": _factors(file, ROPE_FACTORS_LONG, rotated // 2),
        "original_max_position_embeddings": original,
    }
    rope |= {} if attention is None else {"attention_factor": attention}
    rope |= {"partial_rotary_factor": rotated / head_dim} if rotated != head_dim else {}
    return values | {"rope_parameters": rope, "original_max_position_embeddings": original}


def _gpt_oss(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    size = file.value(f"{prefix}.expert_feed_forward_length", int)
    rope = _rope(file, prefix, head_dim)
    return {
        "num_local_experts": file.value(f"{prefix}.expert_count", int),
        "num_experts_per_tok": file.value(f"{prefix}.expert_used_count", int),
        "intermediate_size": size,
        "sliding_window": file.value(f"{prefix}.attention.sliding_window", int, 128),
        # llama.cpp rounds the borders of YaRN's ramp for all models but these.
        "rope_parameters": {**rope, "truncate": False} if rope["rope_type"] == "yarn" else rope,
    }


_OF_FAMILY: Mapping[str, Callable[[GgufFile, str, int], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2moe": _experts,
    "qwen3moe": _experts,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "gpt-oss": _gpt_oss,
}


def generation_config_json(file: GgufFile) -> dict[str, Any]:
    """Which tokens end generation, and the sampling that the file recommends."""
    ends = {file.optional(f"tokenizer.ggml.{key}", int) for key in _END_KEYS} - {None}
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(kinds, GgufArray) and isinstance(tokens, GgufArray) and kinds.count == tokens.count:
        texts = tokens_of(file)
        ends |= {index for index, kind in enumerate(kinds.numbers()) if kind == 3 and texts[index] in END_TEXTS}
    values: dict[str, Any] = {"eos_token_id": sorted(end for end in ends if end is not None)}
    for key, name in _SAMPLING.items():
        if (value := file.metadata.get(key)) is not None:
            values[name] = value
    return values


def _dtype(file: GgufFile) -> str:
    """The numbers that the model was made of, as far as the file says; where it is quantized, bfloat16, as in most models."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds <= {F32}:
        return "float32"
    return "float16" if kinds <= {F16, F32} else "bfloat16"


def _quantization(tensors: Any) -> dict[str, Any]:
    """Layers by the type in which their weights are stored; empty where all are floats."""
    layers: dict[str, list[str]] = {}
    experts: dict[tuple[str, str], dict[str, None]] = {}
    for named in tensors:
        if named.stored.kind.stored != "float" and named.name.endswith(".weight") and len(named.stored.shape) == 2:
            layer = named.name.removesuffix(".weight")
            if (expert := _EXPERT.fullmatch(layer)) is not None:
                experts.setdefault((named.stored.kind.name, expert[2]), {})[expert[1]] = None
            else:
                layers.setdefault(named.stored.kind.name, []).append(layer)
    # One expression for all layers and experts: a name for each would be a hundred thousand.
    for (kind, projection), numbers in experts.items():
        pattern = f"re:model\\.layers\\.({'|'.join(numbers)})\\.mlp\\.experts\\.[0-9]+\\.{projection}$"
        layers.setdefault(kind, []).append(pattern)
    return {"quantization_config": {"quant_method": "gguf", "layers": layers}} if layers else {}


def _rope(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    theta = file.value(f"{prefix}.rope.freq_base", float, 10000.0)
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FACTORS in file.tensors:
        return values | _llama3_rope(file, theta, head_dim)
    kind = file.value(f"{prefix}.rope.scaling.type", str, "none")
    if kind == "none":
        # How files named a linear stretch before there were types.
        factor = file.value(f"{prefix}.rope.scale_linear", float, 1.0)
        return values if factor == 1.0 else values | {"rope_type": "linear", "factor": factor}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{file.path}: {prefix}.rope.scaling.type is {kind!r}; supported: none, linear, yarn")
    values |= {"rope_type": kind, "factor": file.value(f"{prefix}.rope.scaling.factor", float, 1.0)}
    if kind == "yarn":
        original = file.optional(f"{prefix}.rope.scaling.original_context_length", int)
        attention = file.optional(f"{prefix}.rope.scaling.attn_factor", float)
        values |= {} if original is None else {"original_max_position_embeddings": original}
        values |= {} if attention is None else {"attention_factor": attention}
    return values


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's stretch, of which `rope_freqs.weight` has the divisor of each frequency; checked against them."""
    factors = _factors(file, ROPE_FACTORS, head_dim // 2)
    if all(factor == 1.0 for factor in factors):
        return {}
    factor = max(factors)
    if not _are_close(factors, _llama3_factors(factor, theta, head_dim)):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is not Llama 3's stretch of the frequencies, the one that is supported"
        )
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3_ROPE}


def _factors(file: GgufFile, name: str, count: int) -> tuple[float, ...]:
    """The divisors of `count` frequencies that tensor `name` holds."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.kind is not F32 or tensor.shape != (count,) or not 0 < count <= _MAX_ROPE_FACTORS:
        found = "missing" if tensor is None else f"{tensor.kind.name} of shape {list(tensor.shape)}"
        raise CheckpointError(f"{file.path}: {name} is {found}; it must be F32 of [{count}]")
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.start)
        return struct.unpack(f"<{count}f", opened.read(tensor.nbytes))


def _llama3_factors(factor: float, theta: float, head_dim: int) -> list[float]:
    original = _LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _are_close(found: Sequence[float], expected: Sequence[float]) -> bool:
    return all(abs(a - b) <= 1e-3 * abs(b) for a, b in zip(found, expected, strict=True))
