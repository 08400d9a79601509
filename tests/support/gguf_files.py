"""GGUF files written field by field, sound and not; of models, as llama.cpp's conversion stores them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}
NUMBERS |= {"BF16": 30, "MXFP4": 39, "IQ4_XS": 23}
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22)}
BLOCKS |= {
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "MXFP4": (32, 17),
}


@dataclass
class Tensor:
    """`shape` as torch has it; `offset` of None: behind the tensor before."""

    kind: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(content: Any) -> bytes:
    """Type and value of a metadata key; bytes are taken as they are."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    if all(isinstance(item, str) for item in content):
        return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))
    kind, form = (6, "f") if any(isinstance(item, float) for item in content) else (5, "i")
    return struct.pack(f"<IIQ{len(content)}{form}", 9, kind, len(content), *content)


def gguf_bytes(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]],
    tensors: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    keys = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    entries = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(keys))
    head += b"".join(text(key) + value(content) for key, content in keys)
    body = b""
    for name, tensor in entries:
        offset = len(body) if tensor.offset is None else tensor.offset
        head += text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += struct.pack("<IQ", tensor.kind, offset)
        body += tensor.data + b"\0" * (-len(tensor.data) % alignment)
    return head + b"\0" * (-len(head) % alignment) + body


def float_tensor(values: np.ndarray) -> Tensor:
    return Tensor(NUMBERS["F32"], values.shape, values.astype("<f4").tobytes())


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Blocks of any bytes but scales, which are small numbers: uint8 [rows, bytes of a row]."""
    block, nbytes = BLOCKS[kind]
    rows = int(np.prod(shape[:-1]))
    blocks = rng.integers(0, 256, (rows * shape[-1] // block, nbytes), dtype=np.uint8)
    halves = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2), "MXFP4": ()}.get(
        kind, (0,)
    )
    for at in halves:
        scales = rng.uniform(-0.002, 0.002, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 122, len(blocks))
    return blocks.reshape(rows, -1)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's conversion of Llama permutes them; of no heads, as they are."""
    if not heads:
        return weight
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a checkpoint."""
    module, _, suffix = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{suffix}"


def metadata_of(directory: Path, architecture: str) -> dict[str, Any]:
    """The metadata that llama.cpp's conversion writes for a checkpoint of the Hugging Face format."""
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    rope = config.get("rope_parameters") or {}
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }
    if "head_dim" in config:
        values["attention.key_length"] = values["attention.value_length"] = config["head_dim"]
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    metadata = {f"{architecture}.{key}": content for key, content in values.items()} | {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if architecture.startswith("qwen") else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": settings.get("bos_token") is not None,
    }
    for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        if settings.get(name) is not None:
            metadata[f"tokenizer.ggml.{key}"] = vocabulary[settings[name]]
    if "chat_template" in settings:
        metadata["tokenizer.chat_template"] = settings["chat_template"]
    return metadata


def write_gguf(
    directory: Path, path: Path, architecture: str, kind_of: Callable[[str], str] = lambda name: "F32", seed: int = 0
) -> dict[str, np.ndarray]:
    """A checkpoint of the Hugging Face format as the GGUF file `path`; returns the weights that it stands for.

    `kind_of` a tensor's name: its type. Of types of blocks, the weights are made up, and dequantized by the package `gguf`.
    """
    rng = np.random.default_rng(seed)
    config = json.loads((directory / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors, worth = {}, {}
    for name, stored in load_file(directory / "model.safetensors").items():
        values, kind = stored.float().numpy(), kind_of(name)
        part = name.split(".")[-2]
        count = heads.get(part, 0) if architecture == "llama" else 0
        if kind == "F32":
            worth[name] = values
            tensors[gguf_name(name)] = float_tensor(interleaved(values, count))
            continue
        blocks = random_blocks(kind, values.shape, rng)
        worth[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        tensors[gguf_name(name)] = Tensor(NUMBERS[kind], values.shape, interleaved(blocks, count).tobytes())
    path.write_bytes(gguf_bytes(metadata_of(directory, architecture), tensors))
    return worth


def write(path: Path, data: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(data)
    return path
