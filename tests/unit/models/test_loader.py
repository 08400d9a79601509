from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def model_of(dtype: torch.dtype = torch.float32, **overrides: Any) -> DecoderForCausalLM:
    return build_model(ModelConfig.from_dicts({**CONFIG, **overrides}), dtype)


def tensors_of(model: DecoderForCausalLM, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint that fits `model`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(target.full_shape, generator=generator) for name, target in model.weight_targets().items()
    }


def save_sharded(directory: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    names = sorted(tensors)
    weight_map = {name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")


def assert_loaded(model: DecoderForCausalLM, tensors: dict[str, torch.Tensor]) -> None:
    for name, target in model.weight_targets().items():
        assert torch.equal(target.destination, tensors[name].to(target.destination.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_file_is_loaded_in_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(dtype)
    tensors = tensors_of(model)
    save(tmp_path, tensors)
    load_weights(model, tmp_path)
    assert_loaded(model, tensors)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_shards_are_loaded_from_the_files_the_index_names(num_shards: int, tmp_path: Path) -> None:
    model = model_of()
    tensors = tensors_of(model)
    save_sharded(tmp_path, tensors, num_shards)
    load_weights(model, tmp_path)
    assert_loaded(model, tensors)


def test_weights_are_copied_into_the_memory_that_was_allocated(tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path, tensors_of(model))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_weights(model, tmp_path)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_model_holds_as_many_weights_as_its_config_says(architecture: str, overrides: dict[str, Any]) -> None:
    model = model_of(architectures=[architecture], **overrides)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters()
    assert (
        sum(target.destination.numel() for target in model.weight_targets().values()) == model.config.num_parameters()
    )


@pytest.mark.parametrize("stored", [("embed",), ("head",), ("embed", "head")])
def test_tied_head_shares_storage_whatever_the_checkpoint_holds(stored: tuple[str, ...], tmp_path: Path) -> None:
    model = model_of(tie_word_embeddings=True)
    tensors = tensors_of(model)
    on_disk = dict(tensors)
    embedding = on_disk.pop("model.embed_tokens.weight")
    if "embed" in stored:
        on_disk["model.embed_tokens.weight"] = embedding
    if "head" in stored:
        on_disk["lm_head.weight"] = embedding.clone()
    save(tmp_path, on_disk)
    load_weights(model, tmp_path)
    assert_loaded(model, tensors)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_progress_ends_at_the_size_of_the_weights(tmp_path: Path) -> None:
    model = model_of(torch.bfloat16)
    tensors = tensors_of(model)
    save_sharded(tmp_path, tensors, 3)
    calls: list[tuple[str, int, int]] = []
    load_weights(model, tmp_path, lambda name, done, total: calls.append((name, done, total)))
    assert sorted(name for name, _, _ in calls) == sorted(tensors)
    total = 2 * model.config.num_parameters()
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1:] == (total, total)


def test_old_rotary_tables_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    model = model_of()
    tensors = tensors_of(model)
    save(tmp_path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_weights(model, tmp_path)
    assert_loaded(model, tensors)


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    model = model_of()
    tensors = tensors_of(model)
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save(tmp_path, {**tensors, "model.layers.7.surprise": torch.ones(1)})
    message = (
        r"1 tensors of the model are missing: model.layers.1.self_attn.k_norm.weight.*unknown.*model.layers.7.surprise"
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path)


def test_many_missing_tensors_are_counted_and_some_named(tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path, {"model.norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"24 tensors of the model are missing: lm_head.weight, .* and 16 more"):
        load_weights(model, tmp_path)


def test_wrong_shape_names_tensor_expected_and_found(tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path, {**tensors_of(model), "model.layers.0.self_attn.k_proj.weight": torch.ones(8, 16)})
    message = r"k_proj.weight in .*model.safetensors has shape \[8, 16\], config.json makes it \[16, 16\]"
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path, {**tensors_of(model), "model.norm.weight": torch.ones(16, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model.norm.weight in .* is of type I8"):
        load_weights(model, tmp_path)


def test_nothing_is_copied_from_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    model = model_of()
    initialize_dummy_weights(model)
    before = {name: target.destination.clone() for name, target in model.weight_targets().items()}
    save(tmp_path, {**tensors_of(model), "model.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError):
        load_weights(model, tmp_path)
    assert_loaded(model, before)


def test_file_that_the_index_names_but_is_not_there(tmp_path: Path) -> None:
    model = model_of()
    save_sharded(tmp_path, tensors_of(model), 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names files that do not exist: model-00002-of-00003"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 4, 200, -1])
def test_truncated_file_is_named(kept_bytes: int, tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path, tensors_of(model))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        load_weights(model, tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    model = model_of()
    tensors = tensors_of(model)
    save_sharded(tmp_path, tensors, 2)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_broken_index_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        load_weights(model_of(), tmp_path)


def test_directory_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights that can be loaded: expected model.safetensors or"):
        load_weights(model_of(), tmp_path)


def test_dummy_weights_follow_from_the_seed() -> None:
    first, second, other = model_of(), model_of(), model_of()
    initialize_dummy_weights(first, seed=3)
    initialize_dummy_weights(second, seed=3)
    initialize_dummy_weights(other, seed=4)
    same = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, same[name])
        assert torch.isfinite(parameter).all()
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)
    assert torch.equal(first.norm.weight, torch.ones(16))
    layers = first.weight_targets()
    assert not torch.equal(*(layers[f"model.layers.{index}.self_attn.k_proj.weight"].destination for index in (0, 1)))
