"""Checkpoints of transformers as GGUF files of their families, by llama.cpp's names (of the package `gguf`) and layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from tests.support.gguf_files import NUMBERS, Tensor, float_tensor, gguf_bytes, random_blocks

ARCHITECTURES = {
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}
_OF_MIXTRAL = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def write_family(
    directory: Path,
    path: Path,
    kind_of: Callable[[str], str] = lambda name: "F32",
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """The checkpoint as the GGUF file `path`; returns llama.cpp's tensors, dequantized, by its names.

    `kind_of` llama.cpp's name of a tensor of two dimensions or more: its type. Of types of blocks weights are made up.
    `metadata`: more of it, such as a tokenizer.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    rng = np.random.default_rng(seed)
    tensors, worth = {}, {}
    for name, values in _tensors(config, load_file(directory / "model.safetensors")):
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        own = f"{own}.weight" if own.endswith("attn_sinks") else own
        values = np.ascontiguousarray(_heads(config, own, values))
        kind = kind_of(own) if values.ndim > 1 and "bias" not in own and "gate_inp" not in own else "F32"
        if kind == "F32":
            worth[own], tensors[own] = values, float_tensor(values)
            continue
        blocks = random_blocks(kind, values.shape, rng)
        worth[own] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(values.shape)
        tensors[own] = Tensor(NUMBERS[kind], values.shape, blocks.tobytes())
    rope = _rope(config)
    for key, name in (("long_factor", "rope_factors_long"), ("short_factor", "rope_factors_short")):
        if key in rope:
            tensors[f"{name}.weight"] = float_tensor(np.array(rope[key], dtype=np.float32))
    values = {**(metadata or {}), **_metadata(config, gguf.MODEL_ARCH_NAMES[architecture])}
    path.write_bytes(gguf_bytes(values, tensors))
    return worth


def state_of(worth: dict[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """llama.cpp's tensors under the names and in the layouts of the checkpoint in `directory`."""
    config = json.loads((directory / "config.json").read_text())
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
    stored = load_file(directory / "model.safetensors")
    found = {}
    for name, values in stored.items():
        usual = _usual(name)
        expert = _EXPERT.fullmatch(usual)
        if config["model_type"] == "gpt_oss" and ".experts.gate_up_proj" in name:
            kind = "bias" if name.endswith("_bias") else "weight"
            layer = name.split(".")[2]
            pair = [worth[f"blk.{layer}.ffn_{part}_exps.{kind}"] for part in ("gate", "up")]
            pair = [each if kind == "bias" else each.swapaxes(1, 2) for each in pair]
            found[name] = np.stack(pair, axis=-1).reshape(values.shape)
        elif config["model_type"] == "gpt_oss" and ".experts.down_proj" in name:
            layer = name.split(".")[2]
            whole = worth[f"blk.{layer}.ffn_down_exps.{'bias' if name.endswith('_bias') else 'weight'}"]
            found[name] = whole if name.endswith("_bias") else whole.swapaxes(1, 2)
        elif expert is not None:
            own = names.get_name(f"{expert[1]}.{expert[3]}.weight", try_suffixes=(".weight",))
            found[name] = worth[own][int(expert[2])]
        else:
            own = names.get_name(usual, try_suffixes=(".weight", ".bias"))
            own = f"{own}.weight" if own.endswith("attn_sinks") else own
            found[name] = _heads(config, own, worth[own].reshape(values.shape), back=True)
            if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
                found[name] = found[name] - 1
    return found


def _tensors(config: dict[str, Any], stored: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """As llama.cpp's conversion has them: experts stacked, gate and up apart, norms of Gemma with one added."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in stored.items():
        values, name = tensor.float().numpy(), _usual(name)
        expert = _EXPERT.fullmatch(name)
        if config["model_type"] == "gpt_oss" and ".experts." in name:
            parent, _, last = name.rpartition(".")
            kind = "bias" if last.endswith("_bias") else "weight"
            values = values if kind == "bias" else values.swapaxes(1, 2)
            if last.startswith("gate_up_proj"):
                yield f"{parent}.gate_proj.{kind}", np.ascontiguousarray(values[:, ::2])
                yield f"{parent}.up_proj.{kind}", np.ascontiguousarray(values[:, 1::2])
            else:
                yield f"{parent}.down_proj.{kind}", np.ascontiguousarray(values)
        elif expert is not None:
            stacks.setdefault(f"{expert[1]}.{expert[3]}.weight", []).append((int(expert[2]), values))
        elif config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
            yield name, values + 1
        else:
            yield name, values[0] if name.endswith("shared_expert_gate.weight") else values
    for name, stack in stacks.items():
        yield name, np.stack([values for _, values in sorted(stack, key=lambda each: each[0])])


def _usual(name: str) -> str:
    """A tensor's name, but for Mixtral's own ones."""
    for own, other in _OF_MIXTRAL.items():
        name = name.replace(own, other)
    return name


def _heads(config: dict[str, Any], name: str, values: np.ndarray, *, back: bool = False) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order, of the architecture llama: halves of a head interleaved."""
    if config["model_type"] != "mixtral" or not re.search(r"attn_[qk]\.weight", name):
        return values
    heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
    halves = (values.shape[0] // heads // 2, 2) if back else (2, values.shape[0] // heads // 2)
    return values.reshape(heads, *halves, -1).swapaxes(1, 2).reshape(values.shape)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    return rope.get("full_attention", rope)


def _metadata(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    rope = _rope(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if prefix == "phi3":
        values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    else:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if rope.get("rope_type") == "longrope":
        values["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
    elif rope.get("rope_type", "default") != "default":
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if "original_max_position_embeddings" in rope:
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
    if prefix == "gemma3":
        values["rope.freq_base_swa"] = float(config["rope_parameters"]["sliding_attention"]["rope_theta"])
        values["attention.sliding_window_pattern"] = 2
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            values[key] = float(config[key])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        values["expert_feed_forward_length"] = config.get("moe_intermediate_size") or config["intermediate_size"]
        if config.get("shared_expert_intermediate_size"):
            values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    metadata = {f"{prefix}.{key}": value for key, value in values.items()}
    return {"general.architecture": prefix, **metadata}
