"""Checkpoints in float8 with scales of blocks, channels or tensors load as the floats that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError
from pagoda.models.config import ModelConfig
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.model_harness import load_model, run_in_chunks, save_random_checkpoint

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

PROMPTS = [[5, 9, 30, 77, 2], [8]]
BLOCK = 32


def rounded(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float8 values, their scales, and what they stand for; the blocks of the last rows and columns are cut off."""
    if kind == "tensor":
        scales, spread = torch.tensor([0.003]), torch.full_like(weight, 0.003)
    elif kind == "channel":
        scales = 0.001 + 0.002 * torch.rand(len(weight), 1)
        spread = scales.expand_as(weight)
    else:
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        scales = 0.001 + 0.002 * torch.rand(rows, columns)
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    stored = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * spread


QUANTIZATION: dict[str, dict[str, Any]] = {
    "block": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    },
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
        "ignore": ["lm_head"],
    },
}


def write_float8(source: Path, directory: Path, kind: str) -> Path:
    """The checkpoint `source` in float8; returns one with the floats that it stands for."""
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    stored: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "_proj" in name:
            stored[name], scales, floats[name] = rounded(tensor, kind)
            stored[name + ("_scale_inv" if kind == "block" else "_scale")] = scales
            if kind == "tensor":
                stored[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
        else:
            stored[name] = floats[name] = tensor
    plain = directory / "floats"
    plain.mkdir(parents=True)
    save_file(stored, directory / "model.safetensors")
    save_file(floats, plain / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION[kind]}))
    (plain / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("family", ["deepseek-v3", "phi3-window"])
@pytest.mark.parametrize("kind", QUANTIZATION)
def test_a_model_in_float8_is_that_of_the_floats(kind: str, family: str, tmp_path: Path) -> None:
    save_random_checkpoint(family_config(family), tmp_path / "source")
    plain = write_float8(tmp_path / "source", tmp_path / "float8", kind)
    assert ModelConfig.from_directory(tmp_path / "float8").quantization is None
    ours = run_in_chunks(load_model(tmp_path / "float8"), PROMPTS, block_size=8)
    for actual, expected in zip(ours, run_in_chunks(load_model(plain), PROMPTS, block_size=8), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_parts_of_a_tensor_have_the_scales_of_their_places(tmp_path: Path) -> None:
    weight = torch.randn(72, 100)
    stored, scales, expected = rounded(weight, "block")
    save_file({"a.weight": stored, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    tensors = stored_tensors([tmp_path / "model.safetensors"])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {"a.weight": ((72, 100), "F32")}
    source = StoredTensors(tensors)
    assert torch.equal(source.read("a.weight"), expected)
    for rows, columns in (
        (slice(30, 71), slice(0, 100)),
        (slice(0, 5), slice(31, 65)),
        (slice(70, 72), slice(99, 100)),
    ):
        assert torch.equal(source.read("a.weight", rows, columns), expected[rows, columns])
        assert torch.equal(source.read("a.weight", rows), expected[rows])


@pytest.mark.parametrize(
    ("scales", "problem"),
    [
        (None, r"a\.weight .* is of F8_E4M3 and has no scale beside it \(weight_scale_inv, weight_scale\)"),
        (
            torch.ones(7, 2),
            r"the scales of tensor a\.weight .* have shape \[7, 2\] .* does not fit its shape \[72, 100\]",
        ),
        (torch.ones(3, 4, 1), "does not fit its shape"),
        (torch.ones(72, 1, dtype=torch.int32), "type I32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales: torch.Tensor | None, problem: str, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(72, 100).to(torch.float8_e4m3fn)}
    if scales is not None:
        tensors["a.weight_scale"] = scales
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        stored_tensors([tmp_path / "model.safetensors"])
