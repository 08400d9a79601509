"""A tiny random checkpoint of each family, as transformers saves it, with every feature that the family has in use."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

VOCAB_SIZE = 160
# Longest sequence of the parity tests.
LONGEST = 120

_SLIDING, _FULL = "sliding_attention", "full_attention"
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_GROUPED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}
_GROWING_QUERIES: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
_WINDOWS: dict[str, Any] = {"layer_types": [_SLIDING, _FULL, _SLIDING], "sliding_window": 13}

_LINEAR = "linear_attention"
_DELTA_NET: dict[str, Any] = {
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}

# Model type and values of its configuration, by a name.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": LONGEST + 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 3.0, 5.0],
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3-window": ("phi3", {"sliding_window": 17}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.11,
            "logits_scaling": 1.6,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            **_WINDOWS,
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
                _FULL: {
                    "rope_type": "yarn",
                    "rope_theta": 50000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        },
    ),
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 15, "tie_word_embeddings": True},
    ),
    "glm4": ("glm4", {"head_dim": 24, "attention_bias": True}),
    "cohere2": ("cohere2", {**_WINDOWS, "logit_scale": 0.4, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            **_WINDOWS,
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 7.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_WINDOWS,
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
                _FULL: {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
            },
        },
    ),
    # As 31B, and as E4B: five layers, of which the last two read what those before keep.
    "gemma4": (
        "gemma4_text",
        {
            **_WINDOWS,
            "head_dim": 16,
            "global_head_dim": 24,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 7.0,
            "layer_types": [_SLIDING, _FULL, _FULL],
            "tie_word_embeddings": True,
        },
    ),
    "gemma4-moe": (
        "gemma4_text",
        {
            **_WINDOWS,
            "head_dim": 16,
            "global_head_dim": 24,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
            "layer_types": [_SLIDING, _FULL, _FULL],
            "tie_word_embeddings": True,
        },
    ),
    "gemma4-edge": (
        "gemma4_text",
        {
            **_WINDOWS,
            "num_hidden_layers": 5,
            "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "tie_word_embeddings": True,
        },
    ),
    "ministral": ("ministral", {**_WINDOWS, "head_dim": 16}),
    "qwen2-moe": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-next": (
        "qwen3_next",
        {
            **_EXPERTS,
            **_DELTA_NET,
            "num_hidden_layers": 5,
            "layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR, _FULL],
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3.5": ("qwen3_5_text", {**_DELTA_NET, "layer_types": [_LINEAR, _FULL, _LINEAR], "tie_word_embeddings": True}),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        {**_EXPERTS, **_DELTA_NET, "layer_types": [_LINEAR, _LINEAR, _FULL], "shared_expert_intermediate_size": 56},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}),
    "gpt-oss": (
        "gpt_oss",
        {
            **_WINDOWS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    "gemma": ("gemma", {"head_dim": 24, "tie_word_embeddings": True}),
    "glm": ("glm", {"head_dim": 24}),
    "cohere": ("cohere", {"logit_scale": 0.4, "tie_word_embeddings": True}),
    "seed-oss": ("seed_oss", {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}),
    "ernie-4.5": ("ernie4_5", {"head_dim": 24, "use_bias": True}),
    "exaone4": ("exaone4", {**_WINDOWS}),
    "exaone4-full": (
        "exaone4",
        {"sliding_window": None, "layer_types": [_FULL] * 3, "tie_word_embeddings": True},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "norm_topk_prob": True}),
    "granite-moe": (
        "granitemoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.11,
            "logits_scaling": 1.6,
        },
    ),
    "granite-moe-shared": (
        "granitemoeshared",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "shared_intermediate_size": 56,
            "attention_multiplier": 0.25,
        },
    ),
    "minimax-m2": (
        "minimax_m2",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "head_dim": 16,
            "rotary_dim": 8,
        },
    ),
    "dots1": (
        "dots1",
        {**_GROUPED_EXPERTS, **_WINDOWS, "norm_topk_prob": True, "first_k_dense_replace": 1},
    ),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": _GROWING_QUERIES}),
    "mistral4": (
        "mistral4",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "q_lora_rank": 40,
            "first_k_dense_replace": 1,
            "rope_parameters": {**_GROWING_QUERIES, "partial_rotary_factor": 8 / 28},
        },
    ),
    "minicpm3": (
        "minicpm3",
        {**_LATENT, "q_lora_rank": 40, "v_head_dim": None, "dim_model_base": 32, "tie_word_embeddings": True},
    ),
    "youtu": ("youtu", {**_LATENT, "q_lora_rank": 40, "tie_word_embeddings": True}),
    "glm4-moe-lite": (
        "glm4_moe_lite",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "q_lora_rank": 40,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rms_norm_eps": 1e-5,
        },
    ),
    # As V2-Lite and as V2, as V3 and as Moonlight.
    "deepseek-v2-lite": (
        "deepseek_v2",
        {**_LATENT, **_GROUPED_EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "q_lora_rank": 40,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "attention_bias": True,
            "rope_parameters": _DEEPSEEK_YARN,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "q_lora_rank": 40,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": _DEEPSEEK_YARN,
        },
    ),
    "deepseek-v3-no-query-rank": (
        "deepseek_v3",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "attention_bias": True,
            "num_nextn_predict_layers": 0,
        },
    ),
}


def family_config(name: str, **overrides: Any) -> Any:
    """The transformers configuration of one of `FAMILIES`; attention is computed as its formula says."""
    model_type, values = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**_SIZES, **values, **overrides})
    config._attn_implementation = "eager"
    return config
