"""Phi-3, Phi-3.5 and Phi-4: Llama's shape in fused tensors, longrope, and for Phi-4-mini a rotation of a part of each head."""

from __future__ import annotations

from typing import Any

from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_norm, read_num_layers, read_positions
from pagoda.models.layer_config import LayerConfig
from pagoda.models.rope_config import read_rope_config

FUSED = CheckpointNames(
    fused=(("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))
)


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions = read_positions(reader, 4096)
    attention = read_attention(
        reader,
        num_kv_heads=None,
        head_dim=None,
        # Their first checkpoints call longrope "su" or "yarn".
        rope=read_rope_config(reader, positions, aliases={"su": "longrope", "yarn": "longrope"}, original=4096),
        window=reader.optional_integer("sliding_window", None),
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader))
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1e-5),
    }


PHI3 = Family("phi3", "Phi3ForCausalLM", _read, names=FUSED)
