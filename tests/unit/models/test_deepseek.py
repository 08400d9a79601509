"""DeepSeek's families: published configurations, what is refused in words, and `kv_b_proj`, which stays floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig, check_model_device
from pagoda.models.layer_config import DenseMLP, MLAConfig, MoE
from pagoda.models.layers.latent_attention import LatentAttention
from pagoda.models.layers.latent_linear import FloatLatentMethod
from pagoda.models.loading.latent import PackedLatentMethod
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights
from pagoda.models.loading.packed import PackedLinearMethod, weight_bytes
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.weight_size import expected_weight_bytes
from pagoda.scheduling.kv_groups import LatentKV
from pagoda_kernels.gpu.tuning import load_table
from pagoda_kernels.reference.linear import unpack
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.quantized_checkpoints import METHODS, quantized_model, write_quantized

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

# As they are published; what says nothing about the model is left out.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "routed_scaling_factor": 2.827,
    "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0},
    "rope_theta": 50000.0,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE = {
    **V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}


@pytest.mark.parametrize(
    ("published", "billions", "active"),
    [(V3, 671.0, 37.0), (KIMI_K2, 1026.0, 32.0), (V2_LITE, 15.7, 2.5)],
    ids=["v3", "kimi-k2", "v2-lite"],
)
def test_published_models_have_the_parameters_that_they_say(
    published: dict[str, Any], billions: float, active: float
) -> None:
    config = ModelConfig.from_dicts(published)
    assert config.num_parameters() / 1e9 == pytest.approx(billions, rel=0.005)
    assert config.num_parameters_per_token() / 1e9 == pytest.approx(active, rel=0.05)
    assert config.max_context_length == published["max_position_embeddings"]
    assert [type(layer.mlp) for layer in config.layers[:4]].count(DenseMLP) == published["first_k_dense_replace"]


def test_a_token_takes_one_latent_a_layer() -> None:
    config = ModelConfig.from_dicts(V3)
    assert set(config.kv_specs) == {LatentKV(512, 64)}
    assert config.kv_bytes_per_token(2) == 61 * 576 * 2
    assert config.kv_groups(16).block_bytes(range(61), 8, 16, 2) == 2 * 61 * 576 * 16  # the same on every rank


def test_scores_are_scaled_as_for_a_stretched_rope() -> None:
    attention = ModelConfig.from_dicts(V3).layers[0].attention
    assert isinstance(attention, MLAConfig)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * 3.688879454113936 + 1) ** 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scoring_func": "softmax"}, "scoring_func .softmax. is not supported by this model; supported: sigmoid"),
        ({"topk_method": "greedy"}, "topk_method .greedy. is not supported by this model; supported: noaux_tc"),
        ({"n_group": 7}, "n_routed_experts=256 cannot be divided into n_group=7 groups of 2 or more"),
        ({"topk_group": 9}, "topk_group must be an integer of at least 1 and at most 8"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok must be .* at most 32"),
        ({"index_topk": 2048}, "index_topk .sparse attention. is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; supported: 1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 is odd"),
        ({"kv_lora_rank": 511}, "kv_lora_rank=511 is odd"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_what_cannot_run_is_one_sentence(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        ModelConfig.from_dicts({**V3, **change})
    assert "\n" not in str(caught.value)


def test_weights_of_chosen_experts_are_not_normalized_in_v2() -> None:
    with pytest.raises(CheckpointError, match="norm_topk_prob=true is not supported by this model; supported: false"):
        ModelConfig.from_dicts({**V2_LITE, "norm_topk_prob": True})


def test_a_gpu_that_cannot_run_it_is_refused_before_anything_is_loaded() -> None:
    config = ModelConfig.from_dicts(V3)
    check_model_device(config, "cuda")
    check_model_device(config, "cuda", (8, 0))
    with pytest.raises(
        ConfigError, match=r"latent attention, which takes a GPU of capability 8\.0 or later; this one has 7\.5"
    ):
        check_model_device(config, "cuda", (7, 5))
    with pytest.raises(ConfigError, match=r"device=cuda: .* has latents of 1088, with 576 as the most.*use device=cpu"):
        check_model_device(ModelConfig.from_dicts({**V3, "kv_lora_rank": 1024}), "cuda")
    tables = [load_table(name) for name in ("default", "sm_80", "sm_89", "sm_90")]
    for table in tables:
        for tiles in (table.latent_decode_attention, table.latent_prefill_attention):
            assert {(each.head_dim, each.element_bytes) for each in tiles} == {(576, 2), (576, 4)}


# ---- kv_b_proj ----------------------------------------------------------------------------------------------------------

DENSE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 2,
    "tie_word_embeddings": False,
}


def attention_of(model: torch.nn.Module) -> LatentAttention:
    return next(module for module in model.modules() if isinstance(module, LatentAttention))


@pytest.mark.parametrize("method", ["gptq", "awq", "packed-int4-zeros", "int8"])
def test_a_quantized_checkpoint_has_it_dequantized(method: str, tmp_path: Path) -> None:
    worth = write_quantized(tmp_path, METHODS[method], **DENSE, intermediate_size=64)
    model = quantized_model(tmp_path)
    load_weights(model, tmp_path)
    attention = attention_of(model)
    assert isinstance(attention.o_proj.method, PackedLinearMethod)
    assert attention.o_proj.method.weight.scales is not None
    loaded = attention.kv_b_proj.method
    assert isinstance(loaded, PackedLatentMethod)
    keys, values = worth["model.layers.0.self_attn.kv_b_proj.weight"].view(4, 40, 64).split((16, 24), dim=1)
    found_keys = unpack(loaded.keys).view(4, 64, 16).transpose(1, 2)
    found_values = unpack(loaded.values).view(4, 32, 64)[:, :24]
    torch.testing.assert_close(found_keys.double(), keys, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_values.double(), values, rtol=1e-6, atol=1e-7)


def test_rounding_at_load_leaves_it_alone() -> None:
    config = ModelConfig.from_dicts({**family_config("deepseek-v3").to_dict(), "architectures": []})
    quantization = choose_quantization("int8", None, None, config.linear_input_sizes)
    assert quantization is not None
    model = build_model(config, torch.float32, quantization=quantization)
    initialize_dummy_weights(model)
    assert isinstance(attention_of(model).kv_b_proj.method, FloatLatentMethod)
    assert 36 not in config.linear_input_sizes  # so that its inputs bound no group size


@pytest.mark.parametrize("packed", [False, True])
def test_its_memory_is_counted(packed: bool) -> None:
    config = ModelConfig.from_dicts({**family_config("deepseek-v3").to_dict(), "architectures": []})
    model = build_model(config, torch.float32, packed=packed)
    initialize_dummy_weights(model)
    expected = expected_weight_bytes(config, "float32", packed=False)
    # Halves of heads are filled up to 32 outputs, and so is every packed weight.
    assert expected <= weight_bytes(model) < 1.7 * expected
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoE)]
    assert len(mixtures) == 2
