"""Writes a GGUF file of Qwen3-30B-A3B's shape, cut to some layers, with random weights in the types of Q4_K_M.

    python benchmarks/peers/random_gguf.py TARGET.gguf --tokenizer OTHER.gguf [--layers 12]

Types are those that llama.cpp's quantizer chooses: Q4_K, but Q6_K for the head, and for `attn_v` and `ffn_down` of the first
and last eighth of the layers and of every third one between. Tokens are the other file's, filled up; norms and routers are
F32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
EXPERTS, CHOSEN, UNITS, VOCABULARY = 128, 8, 768, 151936
Q4_K, Q6_K, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q6_K", "F32"))
# Where a block's float16 scales lie, and what they are for weights of a standard deviation of about 0.02.
SCALES = {Q4_K: ((0, 1.4e-4), (2, 1e-3)), Q6_K: ((208, 1.5e-5),)}


def main() -> None:
    """Write the file, which appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file with a tokenizer")
    parser.add_argument("--layers", type=int, default=12)
    own = parser.parse_args()
    building = own.target.with_name(own.target.name + ".part")
    writer = gguf.GGUFWriter(building, "qwen3moe")
    add_metadata(writer, own.layers)
    add_tokenizer(writer, own.tokenizer)
    tensors = list(shapes(own.layers))
    for name, shape, kind in tensors:
        stored = stored_shape(shape, kind)
        if kind is F32:
            writer.add_tensor_info(name, stored, np.dtype(np.float32), 4 * int(np.prod(stored)))
        else:
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, shape, kind in tensors:
        writer.write_tensor_data(random_tensor(name, shape, kind, rng))
    writer.close()
    building.rename(own.target)


def add_metadata(writer: gguf.GGUFWriter, layers: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    writer.add_expert_feed_forward_length(UNITS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    for key, entry in gguf.GGUFReader(path).fields.items():
        if not key.startswith("tokenizer."):
            continue
        values = entry.contents()
        if key == "tokenizer.ggml.tokens":
            values += [f"[PAD{number}]" for number in range(len(values), VOCABULARY)]
        elif key == "tokenizer.ggml.token_type":
            values += [gguf.TokenType.UNUSED.value] * (VOCABULARY - len(values))
        if isinstance(values, list):
            writer.add_array(key, values)
        else:
            writer.add_key_value(key, values, entry.types[0])


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Name, shape and type of every tensor."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN), Q4_K
    yield "output_norm.weight", (HIDDEN,), F32
    yield "output.weight", (VOCABULARY, HIDDEN), Q6_K
    for layer in range(layers):
        eighth = layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (HIDDEN,), F32
        yield f"{block}.attn_q.weight", (HEADS * HEAD_DIM, HIDDEN), Q4_K
        yield f"{block}.attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN), Q4_K
        yield f"{block}.attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN), Q6_K if more else Q4_K
        yield f"{block}.attn_q_norm.weight", (HEAD_DIM,), F32
        yield f"{block}.attn_k_norm.weight", (HEAD_DIM,), F32
        yield f"{block}.attn_output.weight", (HIDDEN, HEADS * HEAD_DIM), Q4_K
        yield f"{block}.ffn_norm.weight", (HIDDEN,), F32
        yield f"{block}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), F32
        yield f"{block}.ffn_gate_exps.weight", (EXPERTS, UNITS, HIDDEN), Q4_K
        yield f"{block}.ffn_up_exps.weight", (EXPERTS, UNITS, HIDDEN), Q4_K
        yield f"{block}.ffn_down_exps.weight", (EXPERTS, HIDDEN, UNITS), Q6_K if more else Q4_K


def stored_shape(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[int, ...]:
    """In numbers of float32, or in bytes."""
    return shape if kind is F32 else gguf.quant_shape_to_byte_shape(shape, kind)


def random_tensor(
    name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, rng: np.random.Generator
) -> npt.NDArray[np.float32 | np.uint8]:
    stored = stored_shape(shape, kind)
    if kind is F32:
        values = rng.standard_normal(stored, dtype=np.float32)
        return 1 + 0.1 * values if "norm" in name else 0.02 * values
    blocks = np.frombuffer(rng.bytes(int(np.prod(stored))), np.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    for at, scale in SCALES[kind]:
        halves = rng.uniform(0.5 * scale, 1.5 * scale, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    return blocks.reshape(stored)


if __name__ == "__main__":
    main()
