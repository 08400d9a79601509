from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagoda.errors import CheckpointError
from pagoda.models.config import GenerationDefaults, ModelConfig

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_json(model_type: str = "llama", **values: Any) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, **SIZES, **values}


def read(model_type: str = "llama", **values: Any) -> ModelConfig:
    return ModelConfig.from_dicts(config_json(model_type, **values))


def write(directory: Path, config: dict[str, Any] | str, generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_omitted_values_are_those_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_attention_heads": 64, "hidden_size": 128}  # Qwen has 32 KV heads unless told otherwise
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    ours = read(model_type, **sizes)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 128 // 64)
    assert ours.norm.eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.layers[0].attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    window = theirs.sliding_window if model_type == "mistral" else None
    assert ours.layer_windows == (window,) * 4


def test_null_kv_heads_mean_as_many_as_heads() -> None:
    for model_type in ARCHITECTURES:
        assert read(model_type, num_key_value_heads=None).num_kv_heads == 8


def test_biases_and_norms_follow_the_family() -> None:
    kv = {"num_key_value_heads": 2}
    has = {
        "llama": read("llama", attention_bias=True, mlp_bias=True),
        "mistral": read("mistral", attention_bias=True),
        "qwen2": read("qwen2", **kv),
        "qwen3": read("qwen3", **kv),
    }
    of_attention = {
        name: (layer.attention.qkv_bias, layer.attention.output_bias, layer.mlp.bias, layer.attention.qk_norm)
        for name, layer in ((name, config.layers[0]) for name, config in has.items())
    }
    assert of_attention == {
        "llama": (True, True, True, None),
        "mistral": (False, False, False, None),
        "qwen2": (True, False, False, None),
        "qwen3": (False, False, False, "head"),
    }


@pytest.mark.parametrize(
    ("model_type", "values", "windows"),
    [
        ("llama", {"sliding_window": 7}, (None, None, None, None)),
        ("mistral", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("mistral", {"sliding_window": None}, (None, None, None, None)),
        ("qwen2", {"sliding_window": 7}, (None, None, None, None)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, (None, None, None, None)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, (None, 7, 7, 7)),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, (7, 7, 7, 7)),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
            (None, 7, None, 7),
        ),
    ],
)
def test_sliding_window_of_each_layer(model_type: str, values: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(model_type, num_key_value_heads=2, **values).layer_windows == windows


def test_old_and_new_rope_spellings_mean_the_same() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    new = read(rope_parameters={**scaling, "rope_theta": 5e5}, max_position_embeddings=4096)
    old = read(rope_scaling=scaling, rope_theta=5e5, max_position_embeddings=4096)
    oldest = read(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        rope_theta=5e5,
        max_position_embeddings=4096,
    )
    assert new.layers == old.layers == oldest.layers
    rope = new.layers[0].attention.rope
    assert (rope.rope_type, rope.theta, rope.factor) == ("yarn", 5e5, 4.0)
    assert read(rope_scaling=None, rope_theta=5e5).layers == read(rope_theta=5e5).layers


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 1000),
        ({"rope_type": "linear", "factor": 2.0}, 2000),
        ({"rope_type": "dynamic", "factor": 1.5}, 1500),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}, 2000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 250,
            },
            1000,
        ),
    ],
)
def test_context_length_counts_the_stretch(rope: dict[str, Any] | None, length: int) -> None:
    assert read(max_position_embeddings=1000, rope_scaling=rope).max_context_length == length


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype_in_either_spelling(values: dict[str, Any], dtype: str) -> None:
    assert read(**values).dtype == dtype


def test_generation_config_names_eos_tokens_and_sampling_defaults(tmp_path: Path) -> None:
    generation = {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    write(tmp_path, config_json(eos_token_id=2), generation)
    config = ModelConfig.from_directory(tmp_path)
    assert config.eos_token_ids == (5, 7)
    assert config.generation == GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 3], (2, 3)), (None, ())])
def test_eos_tokens_of_the_model_without_generation_config(
    eos: int | list[int] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    config = ModelConfig.from_directory(write(tmp_path, config_json(eos_token_id=eos)))
    assert config.eos_token_ids == expected
    assert config.generation == GenerationDefaults()


def test_family_by_model_type_where_no_architecture_is_named() -> None:
    config = config_json("mistral")
    del config["architectures"]
    assert ModelConfig.from_dicts(config).architecture == "MistralForCausalLM"


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert read(num_key_value_heads=2).kv_bytes_per_token(2) == 2 * 4 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "must hold a JSON object, found list"),
        (
            config_json() | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "GPT2LMHeadModel is not supported.*ForCausalLM: Llama, .*Qwen3, ",
        ),
        ({**SIZES}, "model_type None is not supported"),
        (config_json(hidden_act="gelu"), "activation 'gelu' is not supported.*silu"),
        (config_json(rope_scaling={"type": "su"}), "rope type 'su' is not supported.*yarn"),
        (config_json(rope_scaling={"type": "linear"}), "factor is missing; it must be a number of at least 0.001"),
        (config_json(rope_scaling={"type": "linear", "factor": "2"}), "factor must be a number.*found '2'"),
        (config_json(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "differ between layers"),
        (
            config_json(quantization_config={"quant_method": "gguf"}),
            "'gguf' is not supported; supported: gptq, awq, comp",
        ),
        (config_json(vocab_size=None), "vocab_size is missing; it must be an integer of at least 1"),
        (config_json(hidden_size=0), "hidden_size must be an integer of at least 1 and at most 262144, found 0"),
        (
            config_json(num_hidden_layers=True),
            "num_hidden_layers must be an integer of .* at most 1024, found True",
        ),
        (config_json(num_key_value_heads=3), "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        (config_json(hidden_size=60), "hidden_size=60 is not a multiple of num_attention_heads=8"),
        (config_json(head_dim=7), "head_dim=7 is odd"),
        (config_json(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false, found 'yes'"),
        (config_json(dtype="int8"), "dtype 'int8' is not supported"),
        (
            config_json(eos_token_id="</s>"),
            "eos_token_id must be a token id .*, or a list .* found '</s>'",
        ),
        (
            config_json("qwen3", num_key_value_heads=2, layer_types=["full_attention"]),
            "layer_types has 1 entries, num_hidden_layers is 4",
        ),
        (config_json("qwen3", num_key_value_heads=2, layer_types=["chunked"] * 4), "layer_types must be a list of"),
    ],
)
def test_unusable_config_is_refused_with_what_is_wrong(
    config: dict[str, Any] | str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_directory(write(tmp_path, config))
    assert "config.json" in str(caught.value)


def test_missing_directory_and_missing_config_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is not there: a checkpoint is a directory with config.json, or a GGUF file"
    ):
        ModelConfig.from_directory(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        ModelConfig.from_directory(tmp_path)


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pagoda.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
