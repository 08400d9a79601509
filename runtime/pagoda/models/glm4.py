"""GLM-4: half of each head rotated in pairs of neighbours, fused tensors; since 0414 with norms on both sides of attention and
MLP."""

from __future__ import annotations

from typing import Any

from pagoda.models.checkpoint_names import CheckpointNames
from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import Family, read_attention, read_mlp, read_norm, read_num_layers, read_positions
from pagoda.models.layer_config import PRE_NORM, BlockNorms, LayerConfig
from pagoda.models.rope_config import read_rope_config

_BOTH_SIDES = BlockNorms(
    before_attention="input_layernorm",
    after_attention="post_self_attn_layernorm",
    before_mlp="post_attention_layernorm",
    after_mlp="post_mlp_layernorm",
)


def _read(reader: ConfigReader, norms: BlockNorms) -> dict[str, Any]:
    positions = read_positions(reader, 131072)
    attention = read_attention(
        reader,
        num_kv_heads=2,
        head_dim=128,
        rope=read_rope_config(reader, positions, partial_rotary_factor=0.5, interleaved=True),
        qkv_bias=reader.flag("attention_bias", True),
    )
    layer = LayerConfig(attention=attention, mlp=read_mlp(reader), norms=norms)
    return {
        "layers": (layer,) * read_num_layers(reader),
        "max_position_embeddings": positions,
        "norm": read_norm(reader, 1.5625e-07),
    }


_FUSED = CheckpointNames(fused=(("gate_up_proj", ("gate_proj", "up_proj")),))

GLM4 = Family("glm4", "Glm4ForCausalLM", lambda reader: _read(reader, _BOTH_SIDES), names=_FUSED)
GLM = Family("glm", "GlmForCausalLM", lambda reader: _read(reader, PRE_NORM), names=_FUSED)
