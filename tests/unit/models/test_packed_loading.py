"""Weights that are packed as they are read are the checkpoint's, on every rank, in the narrowest dtype that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.layers.embedding import PackedEmbedding
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights, with_tie_as_stored
from pagoda.models.loading.packed import (
    PackedLinearMethod,
    deferred_layers,
    linear_layers,
    weight_bytes,
)
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.weight_size import expected_weight_bytes
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.reference.linear import unpack
from tests.support.kernel_backends import reference_kernels

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
}


class UnconnectedTensorGroup(TensorParallelGroup):
    """A rank's place in a group in which nobody else has anything to add."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def model_of(
    groups: ParallelGroups = SINGLE_RANK, dtype: torch.dtype = torch.float32, **overrides: Any
) -> DecoderForCausalLM:
    return build_model(ModelConfig.from_dicts({**CONFIG, **overrides}), dtype, "cpu", groups, packed=True)


def groups_of(layout: ParallelLayout, rank: int) -> ParallelGroups:
    place = layout.coordinates(rank)
    tensor = UnconnectedTensorGroup(place.tensor_rank, layout.tensor_parallel_size)
    return ParallelGroups(layout, place, tensor, PipelineParallelGroup())


def save_random(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint, of which the values are those of bfloat16 whatever the dtype."""
    whole = build_model(ModelConfig.from_dicts({**CONFIG, **overrides}), torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(target.full_shape, generator=generator).bfloat16().to(dtype)
        for name, target in whole.weight_targets().items()
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


def packed_parts(model: DecoderForCausalLM) -> Iterator[tuple[str, tuple[slice, slice], torch.Tensor]]:
    """Of each part of each packed layer: the tensor's name, which part of it this rank has, and what was packed."""
    for prefix, layer in linear_layers(model):
        assert isinstance(layer.method, PackedLinearMethod)
        weight, row = unpack(layer.method.weight), 0
        for part, shard in layer.parts.items():
            yield f"{prefix}{part}.weight", (shard.slice, layer.inputs.slice), weight[row : row + shard.length]
            row += shard.size


def dtypes_of(model: DecoderForCausalLM) -> set[torch.dtype]:
    methods = [layer.method for _, layer in linear_layers(model)]
    return {method.weight.values.dtype for method in methods if isinstance(method, PackedLinearMethod)}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_packs_its_part_of_each_tensor(sizes: tuple[int, int], tied: bool, tmp_path: Path) -> None:
    tensors = save_random(tmp_path, torch.bfloat16, tie_word_embeddings=tied)
    layout = ParallelLayout(*sizes)
    for rank in range(layout.world_size):
        model = model_of(groups_of(layout, rank), tie_word_embeddings=tied)
        load_weights(model, tmp_path)
        assert not deferred_layers(model)
        for name, index, rows in packed_parts(model):
            assert torch.equal(rows, tensors[name][index]), name
        for name, target in model.weight_targets().items():
            assert torch.equal(target.destination, tensors[name][target.index].to(target.destination.dtype)), name


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_embedding_tied_to_a_packed_head_looks_its_rows_up_there(num_ranks: int, tmp_path: Path) -> None:
    embedding = save_random(tmp_path, torch.bfloat16, tie_word_embeddings=True)["model.embed_tokens.weight"].float()
    ids = torch.tensor([0, 36, 7, 31, 32, 7])
    layout, total = ParallelLayout(num_ranks, 1), torch.zeros(6, 32)
    for rank in range(num_ranks):
        model = model_of(groups_of(layout, rank), tie_word_embeddings=True)
        load_weights(model, tmp_path)
        assert isinstance(model.embed_tokens, PackedEmbedding)
        assert model.embed_tokens.packed is model.lm_head.method.weight
        total += model.embed_tokens(ids.clone())
    assert torch.equal(total, embedding[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_that_bfloat16_holds_are_kept_in_two_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = save_random(tmp_path, dtype)
    model = model_of()
    load_weights(model, tmp_path)
    assert dtypes_of(model) == {torch.bfloat16}
    assert all(torch.equal(rows, tensors[name].float()) for name, _, rows in packed_parts(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_other_value_keeps_a_layer_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = save_random(tmp_path, dtype)
    tensors["model.layers.1.mlp.up_proj.weight"][95, 31] = 1 + 2**-9
    save_file(tensors, tmp_path / "model.safetensors")
    model = model_of()
    load_weights(model, tmp_path)
    assert model.layers[1].mlp.gate_up_proj.method.weight.values.dtype == torch.float32
    assert model.layers[1].mlp.down_proj.method.weight.values.dtype == torch.bfloat16
    assert all(torch.equal(rows, tensors[name].float()) for name, _, rows in packed_parts(model))


def test_a_bfloat16_model_rounds_what_it_reads(tmp_path: Path) -> None:
    tensors = save_random(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][95, 31] = 1 + 2**-9
    save_file(tensors, tmp_path / "model.safetensors")
    model = model_of(dtype=torch.bfloat16)
    load_weights(model, tmp_path)
    assert dtypes_of(model) == {torch.bfloat16}
    assert all(torch.equal(rows, tensors[name].bfloat16()) for name, _, rows in packed_parts(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_of_its_own_stays_as_narrow_as_it_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    embedding = save_random(tmp_path, dtype)["model.embed_tokens.weight"]
    model = model_of()
    load_weights(model, tmp_path)
    assert model.embed_tokens.weight.dtype == dtype
    rows = model.embed_tokens(torch.tensor([3, 36]))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, embedding[[3, 36]].float())


def test_a_tied_weight_may_be_stored_under_the_heads_name_or_under_both(tmp_path: Path) -> None:
    tensors = save_random(tmp_path, tie_word_embeddings=True)
    embedding = tensors["model.embed_tokens.weight"].clone()
    del tensors["model.embed_tokens.weight"]
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        tensors |= {name: embedding.clone() for name in names}
        save_file(tensors, tmp_path / "model.safetensors")
        model = model_of(tie_word_embeddings=True)
        load_weights(model, tmp_path)
        assert torch.equal(model.embed_tokens(torch.arange(37)), embedding)
    config = ModelConfig.from_dicts({**CONFIG, "tie_word_embeddings": True})
    assert with_tie_as_stored(config, tmp_path).tie_word_embeddings
    tensors["lm_head.weight"][36, 31] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert not with_tie_as_stored(config, tmp_path).tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_made_up_weights_are_the_same_packed_or_not_on_all_ranks(tied: bool) -> None:
    plain = build_model(ModelConfig.from_dicts({**CONFIG, "tie_word_embeddings": tied}), torch.float32)
    initialize_dummy_weights(plain, seed=5)
    expected = {name: target.destination for name, target in plain.weight_targets().items()}
    for sizes in ((1, 1), (2, 1), (1, 3)):
        layout = ParallelLayout(*sizes)
        for rank in range(layout.world_size):
            model = model_of(groups_of(layout, rank), tie_word_embeddings=tied)
            initialize_dummy_weights(model, seed=5)
            weight = model.layers[0].mlp.down_proj.method.weight
            name = f"model.layers.{model.shard.layers[0]}.mlp.down_proj.weight"
            assert torch.equal(unpack(weight), expected[name][:, model.layers[0].mlp.down_proj.inputs.slice])


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_weights_is_what_was_expected_of_them(
    kind: str | None, tied: bool, dtype: str, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": tied, "torch_dtype": "bfloat16", "vocab_size": 64}
    save_random(tmp_path, torch.bfloat16, **changes)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    config = ModelConfig.from_directory(tmp_path)
    quantization = choose_quantization(kind, None, None, config.linear_input_sizes)
    model = build_model(config, getattr(torch, dtype), "cpu", quantization=quantization, packed=True)
    load_weights(model, tmp_path)
    assert weight_bytes(model) == expected_weight_bytes(config, dtype, quantization, packed=True)


def test_memory_of_unpacked_weights_is_that_of_their_dtype(tmp_path: Path) -> None:
    save_random(tmp_path)
    config = ModelConfig.from_dicts(CONFIG)
    model = build_model(config, torch.float32)
    load_weights(model, tmp_path)
    assert weight_bytes(model) == expected_weight_bytes(config, "float32", packed=False) == 4 * config.num_parameters()
