"""Checkpoints as people have them. What transformers makes of each is what Pagoda must make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.loader import check_weights, load_weights, with_tie_as_stored
from pagoda.models.quantization.writing import write_quantized_checkpoint

Tensors = dict[str, torch.Tensor]

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


def config_json(**values: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **values}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(0)
    return {name: tensor.contiguous() for name, tensor in LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict().items()}


@pytest.fixture(scope="module")
def others(tensors: Tensors) -> Tensors:
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in tensors.items()}


def save_config(directory: Path, **values: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config_json(**values)))


def save_index(directory: Path, name: str, shards: dict[str, list[str]]) -> None:
    weight_map = {tensor: file for file, names in shards.items() for tensor in names}
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loaded(directory: Path) -> DecoderForCausalLM:
    config = with_tie_as_stored(ModelConfig.from_directory(directory), directory)
    model = build_model(config, torch.float32)
    load_weights(model, directory)
    return model


def assert_as_transformers(directory: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = loaded(directory)
    expected = theirs.state_dict()
    for name, target in ours.weight_targets().items():
        assert torch.equal(target.destination, expected[name]), name
    assert ours.embed_tokens is not None
    assert ours.lm_head is not None
    assert torch.equal(ours.lm_head.weight, expected["lm_head.weight"])
    is_tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == is_tied


def both_single_and_index(directory: Path, tensors: Tensors, others: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors")
    save_file(others, directory / "model-00001-of-00001.safetensors")
    save_index(directory, INDEX, {"model-00001-of-00001.safetensors": list(others)})


def safetensors_beside_torch(directory: Path, tensors: Tensors, others: Tensors) -> None:
    torch.save(others, directory / "pytorch_model.bin")
    save_file(tensors, directory / "shard.safetensors")
    save_index(directory, INDEX, {"shard.safetensors": list(tensors)})


def torch_file(directory: Path, tensors: Tensors, others: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def old_torch_file(directory: Path, tensors: Tensors, others: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def torch_file_beside_its_index(directory: Path, tensors: Tensors, others: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")
    torch.save(others, directory / "shard.bin")
    save_index(directory, TORCH_INDEX, {"shard.bin": list(others)})


def torch_shards(directory: Path, tensors: Tensors, others: Tensors) -> None:
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, members in shards.items():
        torch.save({name: tensors[name] for name in members}, directory / file)
    save_index(directory, TORCH_INDEX, shards)


def torch_file_with_more_than_tensors(directory: Path, tensors: Tensors, others: Tensors) -> None:
    torch.save({**tensors, "epoch": 3}, directory / "pytorch_model.bin")


def tensors_that_are_views(directory: Path, tensors: Tensors, others: Tensors) -> None:
    views = {
        name: torch.stack([tensor, tensor + 1])[0].mT if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    torch.save(
        {name: view.mT if view.ndim == 2 else view for name, view in views.items()}, directory / "pytorch_model.bin"
    )


def extra_tensors(directory: Path, tensors: Tensors, others: Tensors) -> None:
    extra = {"model.layers.7.mlp.up_proj.weight": torch.ones(3), "score.weight": torch.ones(2, dtype=torch.int8)}
    save_file({**tensors, **extra}, directory / "model.safetensors")


def names_without_model(directory: Path, tensors: Tensors, others: Tensors) -> None:
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors"
    )


def names_with_model_twice(directory: Path, tensors: Tensors, others: Tensors) -> None:
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")


KINDS = [
    both_single_and_index,
    safetensors_beside_torch,
    torch_file,
    old_torch_file,
    torch_file_beside_its_index,
    torch_shards,
    torch_file_with_more_than_tensors,
    tensors_that_are_views,
    extra_tensors,
    names_without_model,
    names_with_model_twice,
]


@pytest.mark.parametrize("save", KINDS, ids=lambda save: save.__name__)
def test_weights_are_those_that_transformers_loads(
    save: Callable[[Path, Tensors, Tensors], None], tensors: Tensors, others: Tensors, tmp_path: Path
) -> None:
    save_config(tmp_path)
    save(tmp_path, tensors, others)
    assert_as_transformers(tmp_path)


TIES = {
    "both, different": lambda tensors: tensors,
    "both, equal": lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    "embedding only": lambda tensors: {name: tensors[name] for name in tensors if name != "lm_head.weight"},
    "head only": lambda tensors: {name: tensors[name] for name in tensors if name != "model.embed_tokens.weight"},
    "both, different, without model.": lambda tensors: {
        name.removeprefix("model."): tensor for name, tensor in tensors.items()
    },
}


@pytest.mark.parametrize("stored", TIES.values(), ids=TIES.keys())
def test_tied_head_is_the_one_that_transformers_has(
    stored: Callable[[Tensors], Tensors], tensors: Tensors, tmp_path: Path
) -> None:
    save_config(tmp_path, tie_word_embeddings=True)
    save_file(stored(tensors), tmp_path / "model.safetensors")
    assert_as_transformers(tmp_path)


def test_tied_head_of_a_torch_file_shares_its_storage(tensors: Tensors, tmp_path: Path) -> None:
    save_config(tmp_path, tie_word_embeddings=True)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "architectures", [["LLaMAForCausalLM"], ["LlamaModel"], ["MyLlama"], ["MistralForCausalLM"], None]
)
def test_the_model_type_decides(architectures: list[str] | None, tensors: Tensors, tmp_path: Path) -> None:
    save_config(tmp_path, architectures=architectures, hidden_act="swish")
    save_file(tensors, tmp_path / "model.safetensors")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"
    config = ModelConfig.from_directory(tmp_path)
    assert (config.architecture, config.layers[0].mlp.activation) == ("LlamaForCausalLM", "silu")
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    "head", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForCausalLMEagle3"]
)
def test_a_model_with_another_head_is_refused(head: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"{head} is not supported; supported architectures, each followed by ForCausalLM: Llama,"
    ):
        ModelConfig.from_dicts(config_json(architectures=[head]))


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "rope_scaling": {}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "rope_scaling": None},
    {
        "rope_parameters": {**YARN, "rope_type": "yarn", "beta_fast": 16.0, "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 3.0}},
    {"rope_scaling": {"type": "default"}, "rope_theta": 7e3},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 5e5},
]


@pytest.mark.parametrize("values", ROPES)
def test_rope_in_two_spellings_is_what_transformers_takes(values: dict[str, Any], tmp_path: Path) -> None:
    save_config(tmp_path, **values)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = ModelConfig.from_directory(tmp_path).layers[0].attention.rope
    assert (ours.rope_type, ours.theta) == (theirs["rope_type"], theirs["rope_theta"])
    for name in ("factor", "beta_fast", "original_max_position_embeddings"):
        if name in theirs:
            assert getattr(ours, name) == theirs[name]


FOREIGN = {
    "consolidated.00.pth": "PyTorch weights in their author's own layout",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "adapter_model.safetensors": "a LoRA adapter without its base model",
    "model-00001-of-00002.safetensors": r"without model.safetensors.index.json",
    "training_args.bin": "under another name than pytorch_model.bin",
}


@pytest.mark.parametrize(("name", "message"), FOREIGN.items())
def test_weights_in_another_form_are_named(name: str, message: str, tmp_path: Path) -> None:
    save_config(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name} is .*{message}|{message}"):
        check_weights(ModelConfig.from_directory(tmp_path), None, tmp_path)


class Code:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model.norm.weight": Code()}, "holds more than tensors"),
        ([torch.ones(1)], "must hold tensors by name, found list"),
        ({"state_dict": {"model.norm.weight": torch.ones(1)}}, r"under its names \['state_dict'\] are none"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_that_is_not_tensors_by_name_is_refused(
    value: Any, message: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(tmp_path)
    torch.save(value, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message):
        check_weights(ModelConfig.from_directory(tmp_path), None, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 10, 1000])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_that_is_cut_off_is_refused(size: int, zipped: bool, tensors: Tensors, tmp_path: Path) -> None:
    save_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not") as caught:
        check_weights(ModelConfig.from_directory(tmp_path), None, tmp_path)
    assert "\n" not in str(caught.value)


def test_unused_tensors_are_logged_once(tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_config(tmp_path)
    extra = {"surprise": torch.ones(1), "model.rotary_emb.inv_freq": torch.ones(1)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    loaded(tmp_path)
    assert [record.getMessage() for record in caplog.records if "surprise" in record.getMessage()] == [
        f"1 tensors in {tmp_path} are not used: surprise"
    ]


def test_a_torch_file_is_quantized_into_safetensors(tensors: Tensors, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_config(source)
    names_with_torch = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    torch.save(names_with_torch, source / "pytorch_model.bin")
    write_quantized_checkpoint(source, tmp_path / "int8", "int8", None, lambda done, total: None)
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == ["config.json", "model.safetensors"]
    config = ModelConfig.from_directory(tmp_path / "int8")
    assert set(check_weights(config, config.quantization, tmp_path / "int8")) > {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": None, "top_p": None, "temperature": None, "eos_token_id": None}, {}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"max_new_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 7.0}, {"max_new_tokens": 7}),
        ({"do_sample": None}, {}),
    ],
)
def test_generation_values_that_mean_off_are_taken_as_that(
    generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    values = ModelConfig.from_dicts(config_json(), generation).generation
    assert {name: getattr(values, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(-1, ()), ([-1], ()), ([2, -1], (2,)), ([], (3,)), (None, (3,))],
)
def test_an_eos_token_of_minus_one_is_none(generation: Any, expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_dicts(config_json(eos_token_id=3), {"eos_token_id": generation}).eos_token_ids == expected
    assert ModelConfig.from_dicts(config_json(eos_token_id=-1)).eos_token_ids == ()


@pytest.mark.parametrize(
    "generation",
    [
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": "50"},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"min_p": 2},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": True},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"eos_token_id": -2},
        {"eos_token_id": "</s>"},
        {"do_sample": "yes"},
    ],
)
def test_an_impossible_generation_value_stops_the_start(generation: dict[str, Any]) -> None:
    (name,) = generation
    with pytest.raises(CheckpointError, match=rf"^generation_config.json: {name} must be .*, found "):
        ModelConfig.from_dicts(config_json(), generation)
