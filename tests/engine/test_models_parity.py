"""Logits of our models over a paged cache against transformers, at every position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from tests.support.kernel_backends import reference_kernels
from tests.support.model_harness import PagedModel, load_model, run_in_chunks, save_random_checkpoint

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

VOCAB_SIZE = 160
PROMPT_LENGTHS = (1, 8, 40, 97)


def make_config(model_type: str, **overrides: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **{**values, **overrides})


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.inference_mode()
def logits_of_transformers(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt])).logits[0].float()
    return logits


def assert_same_logits(theirs: Any, directory: Path, *, block_size: int = 8) -> None:
    ours = run_in_chunks(load_model(directory), prompts(), block_size=block_size)
    for prompt, actual in zip(prompts(), ours, strict=True):
        expected = logits_of_transformers(theirs, prompt)
        assert expected.std() > 0.5, "the logits are too flat to tell anything"
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, window in every layer": ("mistral", {"sliding_window": 11}),
    "mistral, heads wider than the model": ("mistral", {"sliding_window": 64, "head_dim": 48}),
    "qwen2, window in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3, layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, attention biases": ("qwen3", {"attention_bias": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, as many kv heads as heads": ("llama", {"num_key_value_heads": 4}),
    "qwen3, groups of three": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
}

ROPE: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.7},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own attention factor and ramp": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 3.0,
        "original_max_position_embeddings": 80,
        "attention_factor": 0.8,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.2,
        "mscale_all_dim": 0.6,
    },
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_gives_the_logits_of_transformers(model_type: str, tied: bool, tmp_path: Path) -> None:
    config = make_config(model_type, **FAMILIES[model_type], tie_word_embeddings=tied)
    theirs = save_random_checkpoint(config, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    assert_same_logits(theirs, tmp_path, block_size=16)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_variant_gives_the_logits_of_transformers(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_same_logits(save_random_checkpoint(make_config(model_type, **overrides), tmp_path), tmp_path)


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_rope_scaling_gives_the_logits_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    config = make_config("llama", rope_parameters=rope)
    assert_same_logits(save_random_checkpoint(config, tmp_path), tmp_path)


def test_dynamic_rope_past_the_original_length_equals_generation_in_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = make_config("llama", rope_parameters=rope, max_position_embeddings=48)
    theirs = save_random_checkpoint(config, tmp_path)
    tokens = prompts()[-1]
    cache = DynamicCache()
    with torch.inference_mode():
        steps = [tokens[:40], *([token] for token in tokens[40:])]
        expected = [theirs(torch.tensor([step]), past_key_values=cache).logits[0] for step in steps]

    paged = PagedModel(load_model(tmp_path))
    paged.add(tokens)
    paged.step({0: 40})
    for _ in tokens[40:]:
        paged.step({0: 1})
    torch.testing.assert_close(paged.logits_of(0), torch.cat(expected), rtol=0, atol=1e-4)


def test_dynamic_rope_past_the_original_length_does_not_depend_on_the_chunks(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    save_random_checkpoint(make_config("llama", rope_parameters=rope, max_position_embeddings=48), tmp_path)
    model = load_model(tmp_path)
    at_once = PagedModel(model)
    at_once.add(prompts()[-1])
    at_once.step({0: 97})
    in_chunks = run_in_chunks(model, prompts(), block_size=8)[-1]
    torch.testing.assert_close(in_chunks, at_once.logits_of(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_half_precision_is_as_near_to_float32_as_transformers_is(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = save_random_checkpoint(make_config(model_type, **FAMILIES[model_type]), tmp_path, dtype=dtype)
    ours = run_in_chunks(load_model(tmp_path, dtype), prompts(), block_size=16)
    theirs_half = [logits_of_transformers(theirs, prompt) for prompt in prompts()]
    theirs.float()
    exact = [logits_of_transformers(theirs, prompt) for prompt in prompts()]
    our_error = (torch.cat(ours) - torch.cat(exact)).pow(2).mean().sqrt()
    their_error = (torch.cat(theirs_half) - torch.cat(exact)).pow(2).mean().sqrt()
    assert their_error > 0
    assert our_error < 1.2 * their_error


def test_batch_and_chunks_do_not_change_a_sequence(tmp_path: Path) -> None:
    save_random_checkpoint(
        make_config("qwen3", sliding_window=9, use_sliding_window=True, max_window_layers=1), tmp_path
    )
    model = load_model(tmp_path)
    together = run_in_chunks(model, prompts(), block_size=8)
    for prompt, expected in zip(prompts(), together, strict=True):
        alone = PagedModel(model, block_size=16)
        alone.add(prompt)
        alone.step({0: len(prompt)})
        torch.testing.assert_close(alone.logits_of(0), expected, rtol=0, atol=2e-5)
