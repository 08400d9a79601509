"""Writes a checkpoint as GGUF: `python convert_gguf.py CHECKPOINT TARGET bf16|fp32|int8`. Without a vocabulary: ids go in."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "fp32": gguf.GGMLQuantizationType.F32,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}


def main() -> None:
    """Read config.json and model.safetensors, write one file."""
    source, target, weights = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    building = target.with_name(target.name + ".part")
    writer = gguf.GGUFWriter(building, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config, weights)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, values in _tensors(source / "model.safetensors"):
        new_name = names.get_name(name, try_suffixes=(".weight",))
        assert new_name is not None, name
        kind = TYPES[weights] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = _rotary_order(name, values, config)
        writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    building.rename(target)


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], weights: str) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kinds = {
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "fp32": gguf.LlamaFileType.ALL_F32,
        "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(kinds[weights])


def _tensors(path: Path) -> Any:
    """Every tensor of a safetensors file in bfloat16, as float32."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "BF16", entry
        bits = np.frombuffer(data[begin:end], dtype="<u2").astype(np.uint32) << 16
        yield name, bits.view(np.float32).reshape(entry["shape"])


def _rotary_order(name: str, values: npt.NDArray[np.float32], config: dict[str, Any]) -> npt.NDArray[np.float32]:
    """llama.cpp turns neighbours in Llama's q and k, where Hugging Face turns halves: reorder the rows of each head."""
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    kind = ".".join(name.split(".")[-2:])
    if config["model_type"] != "llama" or kind not in heads:
        return values
    rows, columns = values.shape
    halves = values.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main()
