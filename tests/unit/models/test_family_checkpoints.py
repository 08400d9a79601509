"""Checkpoints of families as they are published: text models inside of models that see images, fused tensors, old names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.checkpoint_names import TensorPart
from pagoda.models.config import MAX_GPU_HEAD_DIM, ModelConfig, check_model_device
from pagoda.models.layer_config import AttentionConfig
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors
from pagoda.models.sharding import check_layout
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.gpu.tuning import load_table
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.model_harness import load_model, run_in_chunks, save_random_checkpoint

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

PROMPTS = [[5, 9, 30, 77, 2], [8]]


def logits_of(directory: Path) -> list[torch.Tensor]:
    return run_in_chunks(load_model(directory), PROMPTS, block_size=8)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_gemma3_with_vision(prefix: str, tmp_path: Path) -> None:
    save_random_checkpoint(family_config("gemma3"), tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            key: value for key, value in config.items() if key not in ("dtype", "architectures", "eos_token_id")
        },
        "vision_config": {"hidden_size": 8},
        "torch_dtype": "float32",
        "eos_token_id": [1, 106],
    }
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2, 2)
    renamed["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(2)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(outer))
    save_file(renamed, whole / "model.safetensors")
    read = ModelConfig.from_directory(whole)
    assert (read.eos_token_ids, read.dtype) == ((1, 106), "float32")
    for ours, expected in zip(logits_of(whole), logits_of(tmp_path / "text"), strict=True):
        assert torch.equal(ours, expected)


def test_published_gemma3_leaves_out_what_is_usual() -> None:
    """google/gemma-3-4b-it has hardly more in its config.json."""
    config = ModelConfig.from_dicts(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert config.layer_windows[:7] == (1024,) * 5 + (None, 1024)
    ropes = [layer.attention.rope for layer in config.layers]
    assert [(rope.theta, rope.factor) for rope in (ropes[0], ropes[5]) if rope] == [(1e4, 1.0), (1e6, 8.0)]
    assert config.max_context_length == 131072
    assert (config.dtype, config.tie_word_embeddings) == ("bfloat16", True)


def test_fused_tensors_are_cut_by_name(tmp_path: Path) -> None:
    """A fused tensor of a wrong size fits no layer; the error names it."""
    save_random_checkpoint(family_config("phi3-window"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert name in tensors
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight.*qkv_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (TensorPart(), lambda x: x),
        (TensorPart(start=1, length=2), lambda x: x[1:3]),
        (TensorPart(dim=1, start=2, length=3), lambda x: x[:, 2:5]),
        (TensorPart(expert=1), lambda x: x[1]),
        (TensorPart(expert=2, transposed=True), lambda x: x[2].T),
        (TensorPart(expert=0, transposed=True, start=1, length=3, step=2), lambda x: x[0].T[1::2]),
        (TensorPart(expert=1, start=0, length=2, step=2), lambda x: x[1][0::2]),
    ],
)
def test_part_of_a_stored_tensor(part: TensorPart, expected: Any, tmp_path: Path) -> None:
    whole = torch.arange(3 * 4 * 6).view(3, 4, 6) if part.expert is not None else torch.arange(4 * 6).view(4, 6)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    tensor = stored_tensors([tmp_path / "model.safetensors"])["w"].take(part)
    source = StoredTensors({"name": tensor})
    wanted = expected(whole)
    assert tensor.shape == tuple(wanted.shape)
    assert torch.equal(source.read("name"), wanted)
    assert torch.equal(source.read("name", slice(1, 2)), wanted[1:2])
    assert torch.equal(source.read("name", slice(0, 2), slice(1, 3)), wanted[0:2, 1:3])


def test_every_family_is_named_where_a_model_is_not_supported() -> None:
    with pytest.raises(CheckpointError, match=r"BloomForCausalLM is not supported; .*ForCausalLM: Llama, .*GptOss, "):
        ModelConfig.from_dicts({"architectures": ["BloomForCausalLM"], "model_type": "bloom"})


def wrap_as_text_model(text: Path, whole: Path, *, prefix: str, beside: dict[str, torch.Tensor], **outer: Any) -> None:
    """The checkpoint of a model with a text model in it, and `beside` that."""
    config = json.loads((text / "config.json").read_text())
    values = {key: value for key, value in config.items() if key not in ("dtype", "architectures")}
    tensors = load_file(text / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps({**outer, "text_config": values, "torch_dtype": "float32"}))
    save_file(renamed | beside, whole / "model.safetensors")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_mistral3(prefix: str, tmp_path: Path) -> None:
    save_random_checkpoint(family_config("ministral3"), tmp_path / "text")
    wrap_as_text_model(
        tmp_path / "text",
        tmp_path / "whole",
        prefix=prefix,
        beside={"vision_tower.patch_conv.weight": torch.zeros(2), "multi_modal_projector.norm.weight": torch.zeros(2)},
        architectures=["Mistral3ForConditionalGeneration"],
        model_type="mistral3",
        vision_config={"hidden_size": 8},
    )
    for ours, expected in zip(logits_of(tmp_path / "whole"), logits_of(tmp_path / "text"), strict=True):
        assert torch.equal(ours, expected)


def test_text_model_of_mistral3_is_one_that_there_is() -> None:
    with pytest.raises(
        CheckpointError, match="model_type 'llama' is not supported; supported: mistral, ministral3, mis"
    ):
        ModelConfig.from_dicts(
            {"model_type": "mistral3", "text_config": {"model_type": "llama", "vocab_size": 64, "hidden_size": 64}}
        )


def test_text_model_of_gemma4(tmp_path: Path) -> None:
    save_random_checkpoint(family_config("gemma4-edge"), tmp_path / "text")
    wrap_as_text_model(
        tmp_path / "text",
        tmp_path / "whole",
        prefix="model.language_model.",
        beside={"model.vision_tower.patch.weight": torch.zeros(2), "model.embed_audio.norm.weight": torch.zeros(2)},
        architectures=["Gemma4ForConditionalGeneration"],
        model_type="gemma4",
    )
    for ours, expected in zip(logits_of(tmp_path / "whole"), logits_of(tmp_path / "text"), strict=True):
        assert torch.equal(ours, expected)


GEMMA4_E4B: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_kv_shared_layers": 18,
        "num_key_value_heads": 2,
        "hidden_size_per_layer_input": 256,
    },
}


def test_layers_of_gemma4_that_read_what_others_keep_take_nothing() -> None:
    config = ModelConfig.from_dicts(GEMMA4_E4B)
    groups = config.kv_groups(16, 32768)
    sources = [layer.attention.kv_source for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
    assert sources[:24] == [None] * 24
    assert set(sources[24:]) == {22, 23}  # the last that slides, and the last that sees everything
    assert groups.group_of_layer[24:] == tuple(groups.group_of_layer[source] for source in sources[24:] if source)
    caches = groups.caches(range(42), 1)
    assert [caches[layer] for layer in range(24, 42)] == [caches[source] for source in sources[24:] if source]
    own = ModelConfig.from_dicts(
        {**GEMMA4_E4B, "text_config": {**GEMMA4_E4B["text_config"], "num_hidden_layers": 24, "num_kv_shared_layers": 0}}
    )
    assert groups.block_bytes(range(42), 1, 16, 2) == own.kv_groups(16, 32768).block_bytes(range(24), 1, 16, 2)
    assert config.kv_bytes_per_token(2) == own.kv_bytes_per_token(2)
    with pytest.raises(
        ConfigError, match="pipeline_parallel_size=2: layers of Gemma4ForConditionalGeneration read keys"
    ):
        check_layout(config, ParallelLayout(1, 2))
    with pytest.raises(
        ConfigError, match="device=cuda: Gemma4ForConditionalGeneration has layers that read what others"
    ):
        check_model_device(config, "cuda")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_kv_shared_layers": 42}, "num_kv_shared_layers must be an integer of at least 0 and at most 41"),
        ({"num_kv_shared_layers": 38}, "leaves no layer of 'full_attention' with keys and values of its own"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention=all is not supported"),
        ({"enable_moe_block": True}, "num_experts is missing"),
    ],
)
def test_what_of_gemma4_is_not_there_is_one_sentence(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        ModelConfig.from_dicts({**GEMMA4_E4B, "text_config": {**GEMMA4_E4B["text_config"], **change}})


def test_exaone4_spells_its_pattern_in_letters_too() -> None:
    config = {"model_type": "exaone4", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    config |= {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    windows = ModelConfig.from_dicts({**config, "sliding_window": 7, "sliding_window_pattern": "LLLG"}).layer_windows
    assert windows == (7, 7, 7, None) * 2
    with pytest.raises(CheckpointError, match="sliding_window_pattern must be a number of layers, or L for each"):
        ModelConfig.from_dicts({**config, "sliding_window": 7, "sliding_window_pattern": "LGLG"})


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vision_config": {}},
            "Qwen2_5_VLForConditionalGeneration is not supported; of models that take images or audio, the text model is "
            "served of .*Gemma3ForConditionalGeneration",
        ),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "is_encoder_decoder": True},
            "WhisperForConditionalGeneration is not supported; it is an encoder-decoder model",
        ),
        (
            {"architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio"},
            "of models that take images or audio",
        ),
    ],
)
def test_what_is_supported_is_said_of_the_kind_that_a_model_is_of(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        ModelConfig.from_dicts(config, model_impl="auto")


def test_wider_heads_than_a_gpu_has_configurations_for_are_refused() -> None:
    text = {**GEMMA4_E4B["text_config"], "num_kv_shared_layers": 0}
    config = ModelConfig.from_dicts({**GEMMA4_E4B, "text_config": text})
    with pytest.raises(
        ConfigError, match=r"device=cuda: .* has heads of 512, with 256 as the most, which runs on a CPU only"
    ):
        check_model_device(config, "cuda")
    check_model_device(config, "cpu")
    tables = [load_table(name) for name in ("default", "sm_80", "sm_89", "sm_90")]
    assert {max(each.head_dim for each in table.prefill_attention) for table in tables} == {MAX_GPU_HEAD_DIM}
