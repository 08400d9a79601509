"""Quantized checkpoints hold what an independent reading of their formats says, on every rank; others are refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights
from pagoda.models.loading.packed import PackedLinearMethod, deferred_layers
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.parallel.groups import ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.reference.linear import unpack
from tests.support.kernel_backends import reference_kernels
from tests.support.packed_weights import quantize_int4, quantize_int8
from tests.support.quantized_checkpoints import CONFIG, METHODS, compressed_tensors, quantized_model, write_quantized

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

SIZES = (64, 64, 96)


class UnconnectedTensorGroup(TensorParallelGroup):
    """A rank's place in a group that is never used."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def weights_of(model: DecoderForCausalLM) -> dict[str, torch.Tensor]:
    """The quantized layers' weights, dequantized, part by part."""
    weights = {}
    for index, layer in zip(model.shard.layers, model.layers, strict=True):
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            assert isinstance(linear.method, PackedLinearMethod)
            module = "mlp" if "down_proj" in linear.parts or "gate_proj" in linear.parts else "self_attn"
            rows = unpack(linear.method.weight).split([shard.size for shard in linear.parts.values()])
            weights |= {
                f"model.layers.{index}.{module}.{part}.weight": row
                for part, row in zip(linear.parts, rows, strict=True)
            }
    return weights


def ranks_of(directory: Path, size: int, quantization: Any) -> list[DecoderForCausalLM]:
    layout = ParallelLayout(size, 1)
    models = []
    for rank in range(size):
        groups = ParallelGroups(
            layout, layout.coordinates(rank), UnconnectedTensorGroup(rank, size), PipelineParallelGroup()
        )
        model = build_model(ModelConfig.from_directory(directory), torch.float32, "cpu", groups, quantization)
        load_weights(model, directory)
        models.append(model)
    return models


def write_floats(directory: Path, **config: Any) -> dict[str, torch.Tensor]:
    model = build_model(ModelConfig.from_dicts({**CONFIG, **config}), torch.float32)
    initialize_dummy_weights(model)
    tensors = {name: target.destination.clone() for name, target in model.weight_targets().items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return tensors


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_format(method: str, tmp_path: Path) -> None:
    worth = write_quantized(tmp_path, METHODS[method])
    model = quantized_model(tmp_path)
    load_weights(model, tmp_path)
    weights = weights_of(model)
    assert len(weights) == 14
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), worth[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", ["gptq-v2", "awq", "packed-int4-zeros", "int8", "gptq-whole-rows"])
def test_ranks_hold_their_parts_of_a_quantized_checkpoint(method: str, tmp_path: Path) -> None:
    # Groups of 16 fit both shares of 96 and of 64 inputs; with AWQ they must be 16 too.
    quantization = METHODS[method] | ({"group_size": 16} if method == "awq" else {})
    worth = write_quantized(tmp_path, quantization)
    config = ModelConfig.from_directory(tmp_path)
    first, second = map(weights_of, ranks_of(tmp_path, 2, config.quantization))
    for name, weight in worth.items():
        if name in first:
            across = 1 if "o_proj" in name or "down_proj" in name else 0
            joined = torch.cat([first[name], second[name]], dim=across)
            torch.testing.assert_close(joined.double(), weight, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_ranks_round_alike(kind: str, tied: bool, tmp_path: Path) -> None:
    write_floats(tmp_path, tie_word_embeddings=tied, intermediate_size=128)
    quantization = choose_quantization(kind, 32 if kind == "int4" else None, None, (64, 64, 128))
    (whole,) = ranks_of(tmp_path, 1, quantization)
    halves = ranks_of(tmp_path, 2, quantization)
    first, second = map(weights_of, halves)
    for name, weight in weights_of(whole).items():
        across = 1 if "o_proj" in name or "down_proj" in name else 0
        assert torch.equal(torch.cat([first[name], second[name]], dim=across), weight), name
    heads = [unpack(model.lm_head.method.weight) for model in halves]
    assert torch.equal(torch.cat(heads)[:50], unpack(whole.lm_head.method.weight))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounding_at_load_is_the_kernels_own(kind: str, tmp_path: Path) -> None:
    floats = write_floats(tmp_path)
    (model,) = ranks_of(tmp_path, 1, choose_quantization(kind, None, None, SIZES))
    name = "model.layers.1.mlp.down_proj.weight"
    packed = model.layers[1].mlp.down_proj.method.weight
    expected = quantize_int8(floats[name]) if kind == "int8" else quantize_int4(floats[name], 32)
    assert torch.equal(unpack(packed), unpack(expected))
    step = packed.scales.max()
    assert (unpack(packed) - floats[name]).abs().max() <= step / 2 * 1.001


def test_embedding_tied_to_a_quantized_head_looks_its_rows_up_there(tmp_path: Path) -> None:
    floats = write_floats(tmp_path, tie_word_embeddings=True)
    (model,) = ranks_of(tmp_path, 1, choose_quantization("int4", None, None, SIZES))
    ids = torch.tensor([0, 49, 7, 31, 32, 7])
    rows = model.embed_tokens(ids)
    assert torch.equal(rows, unpack(model.lm_head.method.weight)[ids])
    embedding = floats["model.embed_tokens.weight"]
    assert (rows - embedding[ids]).abs().max() <= embedding.abs().max() / 127


def test_made_up_weights_are_those_of_the_float_model_rounded() -> None:
    config = ModelConfig.from_dicts(CONFIG)
    plain = build_model(config, torch.float32)
    quantized = build_model(config, torch.float32, quantization=choose_quantization("int8", None, None, SIZES))
    for model in (plain, quantized):
        initialize_dummy_weights(model, seed=5)
    assert not deferred_layers(quantized)
    weight = plain.weight_targets()["model.layers.0.mlp.up_proj.weight"].destination
    rounded = weights_of(quantized)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(rounded, unpack(quantize_int8(weight)))


def test_inputs_in_groups_out_of_order_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, {**METHODS["gptq"], "desc_act": True})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = tensors["model.layers.1.mlp.up_proj.g_idx"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.g_idx.*act-order.*supported: groups of inputs in order"
    ):
        load_weights(quantized_model(tmp_path), tmp_path)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    write_quantized(tmp_path, METHODS["awq"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.k_proj\.scales"):
        load_weights(quantized_model(tmp_path), tmp_path)


def test_layers_that_run_as_one_must_be_quantized_alike() -> None:
    quantization = {**METHODS["int8"], "ignore": ["lm_head", "re:.*k_proj"]}
    config = ModelConfig.from_dicts({**CONFIG, "quantization_config": quantization})
    with pytest.raises(CheckpointError, match=r"must be quantized alike, found q_proj: 8 bits.*k_proj: not quantized"):
        build_model(config, torch.float32, quantization=config.quantization)


def test_whole_layers_may_be_left_out(tmp_path: Path) -> None:
    quantization = {**METHODS["int8"], "ignore": ["lm_head", "re:.*down_proj", "model.layers.0.self_attn.o_proj"]}
    config = ModelConfig.from_dicts({**CONFIG, "quantization_config": quantization})
    model = build_model(config, torch.float32, quantization=config.quantization)
    names = set(model.weight_targets())
    assert {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)} <= names
    assert "model.layers.0.self_attn.o_proj.weight" in names
    assert "model.layers.1.self_attn.o_proj.weight" not in names


def test_ranks_that_would_cut_groups_are_refused(tmp_path: Path) -> None:
    write_floats(tmp_path)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size=2 cuts groups of the 96 inputs of .*down_proj.*: 1, 3"
    ):
        ranks_of(tmp_path, 2, choose_quantization("int4", 32, None, SIZES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits=3 is not supported; supported: 4, 8"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 20},
            "group_size=20 is not supported; supported: multiples of 8",
        ),
        ({**METHODS["gptq"], "checkpoint_format": "marlin"}, "'marlin' is not supported; supported: gptq, gptq_v2"),
        ({**METHODS["gptq"], "dynamic": {"-:.*down.*": {}}}, "dynamic"),
        ({**METHODS["awq"], "version": "gemv"}, "'gemv' is not supported; supported: gemm"),
        ({**METHODS["int8"], "format": "marlin-24"}, "'marlin-24' is not supported; supported: pack-quantized, int-q"),
        (compressed_tensors("pack-quantized", 4, 32, symmetric=True, type="float"), "type 'float' is not supported"),
        (compressed_tensors("int-quantized", 8, None, symmetric=True, strategy="tensor"), "strategy 'tensor' is not"),
        ({**METHODS["int8"], "ignore": ["re:("]}, "no regular expression"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; supported: gptq, awq, compressed-tensors"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dicts({**CONFIG, "quantization_config": changes})


def test_static_scales_of_activations_are_refused() -> None:
    quantization = compressed_tensors("int-quantized", 8, None, symmetric=True)
    quantization["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "dynamic": False,
        "strategy": "tensor",
    }
    with pytest.raises(
        CheckpointError, match=r"input_activations: strategy='tensor' is not supported; supported: 'token'"
    ):
        ModelConfig.from_dicts({**CONFIG, "quantization_config": quantization})


def test_scales_for_a_float8_kv_cache_are_welcome_and_others_are_not() -> None:
    quantization = compressed_tensors("int-quantized", 8, None, symmetric=True)
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = ModelConfig.from_dicts({**CONFIG, "quantization_config": {**quantization, "kv_cache_scheme": scheme}})
    assert config.quantization == ModelConfig.from_dicts({**CONFIG, "quantization_config": quantization}).quantization
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme: type='int' is not supported; supported: 'float'"):
        ModelConfig.from_dicts(
            {**CONFIG, "quantization_config": {**quantization, "kv_cache_scheme": {**scheme, "type": "int"}}}
        )


@pytest.mark.parametrize(
    ("asked", "group_size", "method", "message"),
    [
        ("int8", None, "awq", "quantization=int8: the checkpoint is quantized already, awq"),
        ("gptq", None, "awq", "quantization=gptq: the checkpoint is quantized by awq; allowed: int8, int4"),
        ("awq", None, None, "quantization=awq: the checkpoint is not quantized"),
        ("int4", 64, None, "quantization_group_size=64: this model's layers have 64, 96 inputs; possible: 32"),
    ],
)
def test_settings_must_fit_the_checkpoint(asked: str, group_size: int | None, method: str | None, message: str) -> None:
    values = CONFIG if method is None else {**CONFIG, "quantization_config": METHODS[method]}
    stored = ModelConfig.from_dicts(values).quantization
    with pytest.raises(ConfigError, match=message):
        choose_quantization(asked, group_size, stored, SIZES)
