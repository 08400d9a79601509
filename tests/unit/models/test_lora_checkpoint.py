"""PEFT checkpoints: what is taken, and the one sentence for each that is not."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError
from pagoda.models.config import ModelConfig
from pagoda.models.lora import peft
from pagoda.models.lora.peft import LoraCheckpoint, read_adapter, read_version
from pagoda.models.lora.source import AdapterSource
from tests.support.checkpoints import shared_checkpoint
from tests.support.lora_adapters import add_experts, write_adapter
from tests.support.model_families import family_config

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_directory(shared_checkpoint())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", shared_checkpoint(), rank=4)


def change(directory: Path, **settings: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, or take them out, by the ends of their names behind the first layer's `q_proj`."""
    path = directory / "adapter_model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        full = name if "." in name else f"{Q}.{name}.weight"
        found.pop(full, None)
        if tensor is not None:
            found[full] = tensor
    save_file(found, path)


def read(directory: Path, model: ModelConfig, max_lora_rank: int = 16) -> LoraCheckpoint:
    return read_adapter(directory, model, max_lora_rank)


def test_every_layer_has_its_tensors_rank_and_scale(adapter: Path, model: ModelConfig) -> None:
    layers = read(adapter, model).layers
    assert sorted(layers) == sorted(linear.name for linear in model.linears())
    tensors = layers["model.layers.0.self_attn.q_proj"]
    assert (tensors.a, tensors.b) == (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
    assert (tensors.rank, tensors.scale, tensors.first_row) == (4, 2.0, 0)


def test_scales_follow_alpha_rank_patterns_and_rslora(adapter: Path, model: ModelConfig) -> None:
    change(adapter, lora_alpha=6, alpha_pattern={"layers.1.mlp.up_proj": 3, r".*\.0\.mlp.*": 5, "q_proj": 2})
    layers = read(adapter, model).layers
    assert layers["model.layers.0.self_attn.k_proj"].scale == 6 / 4
    assert layers["model.layers.1.self_attn.q_proj"].scale == 2 / 4
    assert layers["model.layers.0.mlp.down_proj"].scale == 5 / 4
    assert layers["model.layers.1.mlp.up_proj"].scale == 3 / 4
    change(adapter, use_rslora=True)
    assert read(adapter, model).layers["model.layers.0.self_attn.k_proj"].scale == 6 / math.sqrt(4)
    change(adapter, rank_pattern={r"q_proj": 8})
    with pytest.raises(CheckpointError, match=r"has rank 4; adapter_config\.json says 8"):
        read(adapter, model)


def test_fused_layers_share_a_and_have_rows_of_b(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "phi3"
    AutoModelForCausalLM.from_config(family_config("phi3")).save_pretrained(directory)
    path = write_adapter(tmp_path / "adapter", directory, targets=("qkv_proj", "gate_up_proj"))
    model = ModelConfig.from_directory(directory)
    layers = read(path, model).layers
    attention = model.layers[0].attention
    q, k, v = (layers[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    assert q.a == k.a == v.a
    assert [q.first_row, k.first_row, v.first_row] == [
        0,
        attention.query_size,
        attention.query_size + attention.kv_size,
    ]
    assert layers["model.layers.0.mlp.up_proj"].first_row == model.layers[0].mlp.size


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3' is not served; supported: LORA"),
    "no kind": ({"peft_type": None}, "peft_type is missing"),
    "DoRA": ({"use_dora": True}, "DoRA adapters are not served"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only': biases of adapters are not served"),
    "biases of B": ({"lora_bias": True}, "biases of adapters"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "token indices": ({"trainable_token_indices": [3]}, "adapters of embeddings"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "activated LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model's weights"),
    "a rank that is none": ({"r": 0}, "r must be an integer of at least 1"),
    "an alpha that is none": ({"lora_alpha": "x"}, "lora_alpha must be a number"),
    "patterns that are none": ({"rank_pattern": [3]}, "rank_pattern must be an object of numbers"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "is no regular expression"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_not_served(
    adapter: Path, model: ModelConfig, settings: dict[str, Any], message: str
) -> None:
    change(adapter, **settings)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json") as caught:
        read(adapter, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "A alone": ({"lora_B": None}, "model.layers.0.self_attn.q_proj has lora_A alone"),
    "unlike ranks": ({"lora_A": torch.zeros(5, 64)}, "has A [5, 64] and B [64, 4]"),
    "other sizes": (
        {"lora_A": torch.zeros(4, 65)},
        "is for 65 inputs and 64 outputs; this model's layer has 64 and 64",
    ),
    "integers": ({"lora_A": torch.zeros(4, 64, dtype=torch.int32)}, "is 'I32'; supported: F32, BF16, F16"),
    "a magnitude": ({f"{Q}.lora_magnitude_vector": torch.zeros(64)}, "DoRA adapters are not served"),
    "a bias": ({f"{Q}.lora_B.bias": torch.zeros(64)}, "biases of adapters are not served"),
    "embeddings": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 8)},
        "adapters of embeddings are not served",
    ),
    "a whole weight": ({"base_model.model.lm_head.weight": torch.zeros(4, 8)}, "whole weights beside an adapter"),
    "the head": (
        {
            "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
            "base_model.model.lm_head.lora_B.weight": torch.zeros(8, 4),
        },
        "adapters of embeddings and heads are not served",
    ),
    "a layer that is not there": (
        {
            "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
            "base_model.model.model.layers.99.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        },
        "this model has no layer model.layers.99.self_attn.q_proj; its layers are of the kinds down_proj, gate_proj",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(
    adapter: Path, model: ModelConfig, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    change_tensors(adapter, **tensors)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors") as caught:
        read(adapter, model)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_names_it(tmp_path: Path, model: ModelConfig) -> None:
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "other"
    AutoModelForCausalLM.from_config(family_config("phi3")).save_pretrained(directory)
    path = write_adapter(tmp_path / "adapter", directory, targets=("qkv_proj",))
    with pytest.raises(CheckpointError, match=r"has no layer .*qkv_proj.*\(the adapter was made for 'tests/base'\)"):
        read(path, model)


def mixture(tmp_path: Path) -> tuple[Path, ModelConfig, Path]:
    """A mixture of experts with an adapter of its attention."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "moe"
    AutoModelForCausalLM.from_config(family_config("mixtral")).save_pretrained(directory)
    path = write_adapter(tmp_path / "adapter", directory, targets=("q_proj", "o_proj"))
    return directory, ModelConfig.from_directory(directory), path


def test_experts_are_taken_as_layers_of_their_own_and_stacked(tmp_path: Path) -> None:
    directory, model, path = mixture(tmp_path)
    assert {name.rpartition(".")[2] for name in read(path, model).layers} == {"q_proj", "o_proj"}
    add_experts(path, directory, stacked=False)
    each = {name: one for name, one in read(path, model).layers.items() if ".experts." in name}
    experts = {linear.name for linear in model.linears() if ".experts." in linear.name}
    assert set(each) == experts
    assert not any(one.num_experts > 1 for one in each.values())
    write_adapter(path, directory, targets=("q_proj",))
    add_experts(path, directory, stacked=True)
    stacked = {name: one for name, one in read(path, model).layers.items() if ".experts." in name}
    assert set(stacked) == experts
    one = next(one for name, one in stacked.items() if name.endswith("layers.1.mlp.experts.2.up_proj"))
    assert one.a.endswith("layers.1.mlp.experts.base_layer.lora_A.weight")
    assert (one.expert, one.num_experts, one.first_row, one.rank) == (2, 4, 40, 8)


def test_stacked_experts_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    directory, model, path = mixture(tmp_path)
    add_experts(path, directory, stacked=True)
    change(path, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(
        CheckpointError, match=r"experts\.base_layer.* but target_parameters .*expected: experts\.gate_up_proj"
    ):
        read(path, model)
    change(path, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    down = "base_model.model.model.layers.0.mlp.experts"
    of_down = load_file(path / "adapter_model.safetensors")
    a, b = of_down[f"{down}.lora_A.weight"], of_down[f"{down}.lora_B.weight"]
    for changed, message in (
        ((a[:-1], b[:, :-1]), r"\(down_proj\) has A .*not those of 4 experts"),
        (
            (b.T, a.T),
            r"is for 64 inputs and 40 outputs; each expert of this model has 40 and 64: save it with PEFT 0\.18",
        ),
        ((a[:4], b[:, :4]), r"experts\.down_proj has rank 1; adapter_config\.json says 8"),
    ):
        change_tensors(
            path,
            **{f"{down}.lora_{which}.weight": each.contiguous() for which, each in zip("AB", changed, strict=True)},
        )
        with pytest.raises(CheckpointError, match=message):
            read(path, model)


def test_the_greatest_rank_is_a_setting(adapter: Path, model: ModelConfig) -> None:
    assert read(adapter, model, 4).max_rank == 4
    with pytest.raises(CheckpointError, match="has rank 4; max_lora_rank is 3"):
        read(adapter, model, 3)


def test_files_that_are_missing_or_cut_off(adapter: Path, model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no directory: a LoRA adapter is one with adapter_config\.json"):
        read(tmp_path / "nothing", model)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1], whole + b"x", whole[:4], b"", b"\xff" * 20, whole[:8] + b"{" * (len(whole) - 8)):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            read(adapter, model)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="save the adapter with safetensors"):
        read(adapter, model)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        read(adapter, model)


def test_files_that_are_not_what_they_seem(adapter: Path, model: ModelConfig, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 20  # with as many bytes behind it: more than its shape says
    changed = json.dumps(header).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + length :] + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read(adapter, model)
    weights.unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(whole)
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read(adapter, model)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match="it must be a regular file"):
        read(adapter, model)


def test_patterns_have_a_time_limit(adapter: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "MATCH_SECONDS", 0.05)
    change(adapter, rank_pattern={r"(?:a|b|ab|[a-z._0-9]|[a-z_.0-9]{2})*[!?]": 4})
    with pytest.raises(CheckpointError, match=r"take longer than 0\.05 s to match"):
        read(adapter, model)


def test_a_version_is_that_of_both_files(adapter: Path) -> None:
    source = AdapterSource(shared_checkpoint(), model_impl="auto", max_lora_rank=16)
    versions = {source.resolve("x", str(adapter)).version}
    assert source.resolve("y", str(adapter)).version in versions
    change(adapter, lora_alpha=3)
    versions.add(source.resolve("x", str(adapter)).version)
    change_tensors(adapter, lora_A=torch.ones(4, 64))
    versions.add(source.resolve("x", str(adapter)).version)
    assert len(versions) == 3
    assert read_version(adapter) in versions
