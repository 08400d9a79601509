"""Qwen3-Next and Qwen3.5: checkpoints as they are published, sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.config.schema import PagodaConfig
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.config import ModelConfig, check_model_device
from pagoda.models.layer_config import AttentionConfig, DeltaNetConfig, MoE
from pagoda.models.recurrent_settings import check_recurrent_settings
from pagoda.models.sharding import check_layout
from pagoda.parallel.layout import ParallelLayout
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.model_harness import load_model, run_in_chunks, save_random_checkpoint

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

PROMPTS = [[5, 9, 30, 77, 2], [8]]
# Qwen/Qwen3-Next-80B-A3B-Instruct, without what does not concern sizes.
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def test_published_qwen3_next() -> None:
    config = ModelConfig.from_dicts(QWEN3_NEXT)
    assert config.num_parameters() == pytest.approx(79.7e9, rel=0.01)
    assert config.num_parameters_per_token() == pytest.approx(3.6e9, rel=0.05)
    kinds = [type(layer.attention) for layer in config.layers]
    assert kinds == [DeltaNetConfig, DeltaNetConfig, DeltaNetConfig, AttentionConfig] * 12
    full = config.layers[3].attention
    assert isinstance(full, AttentionConfig)
    assert full.output_gate
    assert full.rope is not None
    assert (full.rope.theta, full.rope.rotary_dim(256)) == (1e7, 64)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (16, 2, 256), "those of attention"
    assert config.kv_bytes_per_token(2) == 12 * 2 * 2 * 256 * 2
    state = 36 * (32 * 128 * 128 + 3 * 8192) * 4
    assert config.kv_groups(16).state_bytes() == state
    assert config.kv_bytes_per_sequence(2) == 262144 * 24576 + state


def test_qwen3_5_leaves_out_what_is_usual() -> None:
    config = ModelConfig.from_dicts(
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                "dtype": "bfloat16",
                "hidden_size": 2048,
                "num_hidden_layers": 40,
                "num_attention_heads": 16,
                "vocab_size": 248320,
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 10000000,
                    "rope_type": "default",
                },
            },
            "vision_config": {},
        }
    )
    assert (config.dtype, config.num_layers) == ("bfloat16", 40)
    assert config.num_parameters() == pytest.approx(34.7e9, rel=0.02)
    mlp = config.layers[0].mlp
    assert isinstance(mlp, MoE)
    assert (mlp.num_experts, mlp.top_k, mlp.router.normalize, mlp.shared_gate) == (256, 8, True, True)


def test_text_model_of_qwen3_5_with_vision_and_stacked_experts(tmp_path: Path) -> None:
    save_random_checkpoint(family_config("qwen3.5-moe"), tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    outer = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": config,
        "vision_config": {"hidden_size": 8},
    }
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    stacked: dict[str, list[torch.Tensor]] = {}
    renamed = {}
    for name in sorted(tensors):
        prefix, is_expert, rest = name.partition("experts.")
        if not is_expert or not rest[0].isdigit():
            renamed[name.replace("model.", "model.language_model.", 1)] = tensors[name]
        elif "down_proj" in rest:
            stacked.setdefault(f"{prefix}experts.down_proj", []).append(tensors[name])
        elif "gate_proj" in rest:
            both = (tensors[name], tensors[name.replace("gate_proj", "up_proj")])
            stacked.setdefault(f"{prefix}experts.gate_up_proj", []).append(torch.cat(both))
    assert stacked
    for name, experts in stacked.items():
        renamed[name.replace("model.", "model.language_model.", 1)] = torch.stack(experts)
    renamed["model.visual.patch_embed.proj.weight"] = torch.zeros(2, 2)
    renamed["mtp.layers.0.mlp.gate.weight"] = torch.zeros(2, 2)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(outer))
    save_file(renamed, whole / "model.safetensors")
    expected = run_in_chunks(load_model(tmp_path / "text"), PROMPTS, block_size=8)
    for ours, other in zip(run_in_chunks(load_model(whole), PROMPTS, block_size=8), expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"linear_num_value_heads": 24}, "linear_num_value_heads=24 is not a multiple of linear_num_key_heads=16"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types.*full_attention and linear_attention"),
        ({"linear_conv_kernel_dim": 1000}, "linear_conv_kernel_dim"),
    ],
)
def test_impossible_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dicts({**QWEN3_NEXT, **values})


def test_what_a_state_cannot_do_is_refused_by_name() -> None:
    model = ModelConfig.from_dicts(QWEN3_NEXT)
    drafts = PagodaConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    with pytest.raises(ConfigError, match="Qwen3NextForCausalLM has recurrent layers, whose state cannot go back"):
        check_recurrent_settings(drafts, model)
    check_recurrent_settings(PagodaConfig(), model)
    check_model_device(model, "cuda")
    check_layout(model, ParallelLayout(4, 2))
    with pytest.raises(ConfigError, match="its 16 key heads of recurrent layers are not a multiple of 32"):
        check_layout(model, ParallelLayout(32, 1))
