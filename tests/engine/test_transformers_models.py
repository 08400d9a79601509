"""Decoders that have no family here, through transformers' attention interface: tokens equal those of transformers itself.

As in test_greedy_parity.py: prompts arrive together in a cache too small for them, in small chunks, and then once more, when
their prefixes are cached.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.startup import start_core
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.config import ModelConfig
from tests.support.parity import ParityCase, run_greedily

VOCABULARY, LONGEST, NEW_TOKENS = 200, 70, 12
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128, **IDS}
SMALL = {**SIZES, "intermediate_size": 96}
GROUPED = {**SMALL, "num_key_value_heads": 2}

# Each spells its layers in its own way: learned positions, partial rotation, parallel layers, one KV head, factors, experts.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, **IDS},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, **IDS},
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox": SMALL,
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": 24},
    "phi": SMALL,
    "olmo": GROUPED,
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "exaone4": {
        **GROUPED,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v2": {
        **SMALL,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 16,
    },
}
DEFAULT = ("gpt2", "opt", "gpt_neox", "exaone4")
"""The others are slow tests."""


def write_checkpoint(model_type: str, directory: Path) -> Any:
    """Random weights, large enough that logits are far from flat; returns transformers' model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type])).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(1.2 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model


@torch.inference_mode()
def make_case(model_type: str, directory: Path) -> ParityCase:
    model = write_checkpoint(model_type, directory)
    rng = random.Random(1)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(LONGEST)]
    prompts = [
        (shared[: length // 2] + [rng.randrange(3, VOCABULARY) for _ in range(length)])[:length]
        for length in (1, 2, 17, 33, 48, LONGEST, LONGEST)
    ]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    return ParityCase(directory, prompts, expected, LONGEST, NEW_TOKENS, has_window=False)


def settings_of(directory: Path, **changes: Any) -> PagodaConfig:
    values: dict[str, Any] = {
        "device": "cpu",
        "model_impl": "transformers",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 6,
        "max_model_len": LONGEST + NEW_TOKENS,
        "kv_cache_watermark": 0.0,
    }
    return PagodaConfig(model=str(directory), **(values | changes))


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in MODELS],
)
def test_every_token_equals_transformers(model_type: str, tmp_path: Path) -> None:
    case = make_case(model_type, tmp_path / "model")
    windows = (
        ModelConfig.from_directory(case.directory, model_impl="transformers").kv_groups(8, LONGEST + NEW_TOKENS).windows
    )
    # Two of the longest at a time, so that others have to fight for blocks.
    core = start_core(settings_of(case.directory, num_gpu_blocks_override=2 * len(windows) * 11 + 1))
    try:
        assert run_greedily(core, case, "first-") == case.expected
        before = core.stats()
        assert run_greedily(core, case, "second-") == case.expected
        stats = core.stats()
        if windows == (None,):  # a window gives blocks back as fast as others are admitted, and they are soon taken
            assert stats.prefix_cache_hits > before.prefix_cache_hits
            assert stats.num_preemptions > 0
        assert stats.num_blocks_in_use == 0
    finally:
        core.shutdown()


def test_layers_with_windows_are_groups_of_their_own(tmp_path: Path) -> None:
    config = ModelConfig.from_dicts({"model_type": "exaone4", **MODELS["exaone4"]}, model_impl="transformers")
    assert config.kv_groups(8).windows == (None, 16, 16)
    assert config.architecture == "Exaone4ForCausalLM"


def refuse(match: str, config: dict[str, Any], model_impl: str = "auto") -> None:
    with pytest.raises(CheckpointError, match=match):
        ModelConfig.from_dicts(config, model_impl=model_impl)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder model"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "layers of 'mamba' keep a state"),
        ({"model_type": "zamba3", "mamba_d_state": 16}, "keep a state"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "keep a state"),
        ({"model_type": "kimi_linear", "linear_attn_config": {"head_dim": 128}}, "keep a state"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "sparse attention, index_topk"),
        ({"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "code in its repository"),
        ({"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints run with"),
        ({"architectures": ["ThingForCausalLM"]}, "without a model_type"),
    ],
)
def test_what_cannot_run_is_a_sentence_from_config_json_alone(
    config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagoda.models.transformers_config._observed", lambda *_: pytest.fail("transformers was asked"))
    refuse(message, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nothing_like_it"}, "transformers does not take this configuration of 'nothing_like_it'"),
        (
            {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99},
            "attention interface",
        ),
        ({"model_type": "gptj", "n_embd": 64, "n_layer": 1, "n_head": 4}, "its attention does not use it"),
        ({"model_type": "vit"}, "no causal language model of type 'vit'"),
    ],
)
def test_what_transformers_cannot_run_is_a_sentence(config: dict[str, Any], message: str) -> None:
    refuse(message, config)


def test_an_own_family_can_be_asked_for_and_refused_and_run_through_transformers(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", **MODELS["gpt2"]}
    refuse("GPT2LMHeadModel|gpt2", gpt2, model_impl="pagoda")
    assert ModelConfig.from_dicts(gpt2, model_impl="auto").architecture == "GPT2LMHeadModel"
    llama = {"model_type": "llama", **GROUPED}
    assert ModelConfig.from_dicts(llama, model_impl="auto").transformers is None
    assert ModelConfig.from_dicts(llama, model_impl="transformers").transformers is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"quantization": "int8"}, "quantization=int8"),
    ],
)
def test_what_it_has_not_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint("gpt2", tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        start_core(settings_of(tmp_path / "model", **changes))


def test_a_model_that_means_something_else_with_paged_attention_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For instance one that takes its positions from elsewhere."""
    from pagoda.models import transformers_model

    write_checkpoint("gpt2", tmp_path / "model")
    run: Callable[..., torch.Tensor] = transformers_model.TransformersForCausalLM.run_decoder
    monkeypatch.setattr(
        transformers_model.TransformersForCausalLM,
        "run_decoder",
        lambda self, ids, positions: run(self, ids, positions - positions[0]),
    )
    with pytest.raises(CheckpointError, match="cannot serve it"):
        start_core(settings_of(tmp_path / "model"))
