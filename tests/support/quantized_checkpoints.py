"""Tiny quantized checkpoints, packed word by word as the formats describe it, and what their weights are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the value that stands at each place of a word


def compressed_tensors(
    layout: str, bits: int, group_size: int | None, *, symmetric: bool, **changes: Any
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "symmetric": symmetric,
        **changes,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq-int8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True},
    "gptq-whole-rows": {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": True},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "packed-int4": compressed_tensors("pack-quantized", 4, 32, symmetric=True),
    "packed-int4-zeros": compressed_tensors("pack-quantized", 4, 16, symmetric=False),
    "packed-int8": compressed_tensors("pack-quantized", 8, 32, symmetric=True),
    "int8": compressed_tensors("int-quantized", 8, None, symmetric=True),
    "int8-zeros": compressed_tensors("int-quantized", 8, None, symmetric=False),
}


def write_quantized(directory: Path, quantization: dict[str, Any], **config: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint; returns the float weights that its tensors stand for, float64, by their usual names."""
    values = {**CONFIG, **config}
    model = build_model(ModelConfig.from_dicts(values), torch.float32)
    generator = np.random.default_rng(3)
    stored: dict[str, torch.Tensor] = {}
    worth: dict[str, torch.Tensor] = {}
    for name, target in model.weight_targets().items():
        if "_proj" in name and name.endswith(".weight"):
            tensors, weight = quantized_tensors(target.full_shape, quantization, generator)
            stored |= {name.removesuffix("weight") + key: value for key, value in tensors.items()}
        else:
            weight = generator.standard_normal(target.full_shape)
            stored[name] = torch.from_numpy(weight).float()
        worth[name] = torch.from_numpy(weight)
    save_file(stored, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**values, "quantization_config": quantization}))
    return worth


def quantized_tensors(
    shape: tuple[int, ...], quantization: dict[str, Any], generator: np.random.Generator
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """A random layer in the format, and its weight [outputs, inputs]."""
    outputs, inputs = shape
    method = quantization["quant_method"]
    weights = quantization["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else quantization
    bits = weights.get("bits", weights.get("num_bits"))
    size = weights["group_size"] if weights["group_size"] not in (None, -1) else inputs
    groups = inputs // size
    q = generator.integers(0, 2**bits, (outputs, inputs))
    scales = generator.uniform(0.01, 0.02, (outputs, groups)).astype(np.float32)
    zeros = generator.integers(0, 2**bits, (outputs, groups))
    if weights.get("symmetric"):
        zeros[:] = 2 ** (bits - 1)
    of_input = np.arange(inputs) // size
    weight = (q - zeros[:, of_input]) * scales[:, of_input].astype(np.float64)
    tensors: dict[str, np.ndarray]
    if method == "gptq":
        stored_zeros = zeros if quantization.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % 2**bits
        tensors = {
            "qweight": words(q.T, bits, axis=0),
            "scales": scales.T,
            "qzeros": words(stored_zeros.T, bits, axis=1),
            "g_idx": of_input.astype(np.int32),
        }
    elif method == "awq":
        tensors = {"qweight": awq_words(q.T), "scales": scales.T, "qzeros": awq_words(zeros.T)}
    elif quantization["format"] == "int-quantized":
        tensors = {"weight": (q - 2 ** (bits - 1)).astype(np.int8), "weight_scale": scales}
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = (zeros - 2 ** (bits - 1)).astype(np.int8)
    else:
        tensors = {"weight_packed": words(q, bits, axis=1), "weight_scale": scales, "weight_shape": np.array(shape)}
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = words(zeros, bits, axis=0)
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}, weight


def words(values: np.ndarray, bits: int, *, axis: int) -> np.ndarray:
    """Consecutive values along `axis` in one 32-bit word, the first in its lowest bits."""
    factor = 32 // bits
    values = values if axis == 1 else values.T
    packed = np.zeros((values.shape[0], -(-values.shape[1] // factor)), np.uint32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            packed[row, column // factor] |= np.uint32(int(values[row, column]) << bits * (column % factor))
    return np.ascontiguousarray(packed if axis == 1 else packed.T).view(np.int32)


def awq_words(values: np.ndarray) -> np.ndarray:
    """Eight consecutive columns in one word, in AWQ's order."""
    ordered = values.reshape(values.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(values.shape)
    return words(ordered, 4, axis=1)


def quantized_model(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderForCausalLM:
    """The model of a quantized checkpoint, ready for its weights."""
    config = ModelConfig.from_directory(directory)
    return build_model(config, dtype, quantization=config.quantization)
