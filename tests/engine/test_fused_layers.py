"""A packed model, layer by layer and as one operator, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.loading.loader import load_weights
from pagoda.models.loading.packed import PackedLinearMethod
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.kernel_backends import reference_kernels
from tests.support.model_harness import PagedModel

require_cpu_kernels()

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

SPECS = {
    "qwen3": DummySpec(family="qwen3"),
    "qwen2 tied bfloat16": DummySpec(family="qwen2", num_kv_heads=1, tie_word_embeddings=True, dtype="bfloat16"),
    "mistral window": DummySpec(family="mistral", sliding_window=20),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}


def load(directory: Path, dtype: torch.dtype, *, packed: bool, fused: bool) -> DecoderForCausalLM:
    backend.use_backend("cpu" if packed else "reference")
    model = build_model(ModelConfig.from_directory(directory), dtype, packed=packed)
    load_weights(model, directory)
    if fused:
        fuse_layers(model)
    return model


@torch.inference_mode()
def logits_of(model: DecoderForCausalLM) -> list[torch.Tensor]:
    """Of three sequences, in steps that mix decoding with chunks."""
    paged = PagedModel(model)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 50, 70):
        paged.add(torch.randint(3, 500, (length,), generator=generator).tolist())
    paged.step({0: 1, 1: 30, 2: 1})
    paged.step({1: 20, 2: 69})
    return [torch.cat([part.flatten() for part in sequence.logits]) for sequence in paged.sequences]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SPECS)
def test_fused_layers_have_the_bits_of_single_ones_and_are_near_the_reference(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = write_dummy_checkpoint(tmp_path / "model", SPECS[name])
    expected = logits_of(load(directory, dtype, packed=False, fused=False))
    single = logits_of(load(directory, dtype, packed=True, fused=False))
    model = load(directory, dtype, packed=True, fused=True)
    assert model.fused_layers is not None
    for fused, one_by_one, reference in zip(logits_of(model), single, expected, strict=True):
        assert torch.equal(fused, one_by_one)
        torch.testing.assert_close(fused, reference, rtol=0, atol=TOLERANCE[dtype])


def test_bfloat16_checkpoint_in_float32_keeps_its_weights_in_two_bytes(tmp_path: Path) -> None:
    directory = write_dummy_checkpoint(tmp_path / "model", SPECS["qwen2 tied bfloat16"])
    model = load(directory, torch.float32, packed=True, fused=False)
    assert model.lm_head is not None
    methods = [layer.method for layer in model.modules() if hasattr(layer, "method")]
    assert all(isinstance(method, PackedLinearMethod) for method in methods)
    assert {method.weight.values.dtype for method in methods if isinstance(method, PackedLinearMethod)} == {
        torch.bfloat16
    }
    # The embedding has no copy of its own: what is left besides packed weights are norms and biases.
    assert all(parameter.dim() == 1 for parameter in model.parameters())


def test_without_the_compiled_kernels_layers_stay_single(tmp_path: Path) -> None:
    directory = write_dummy_checkpoint(tmp_path / "model", SPECS["qwen3"])
    assert load(directory, torch.float32, packed=False, fused=True).fused_layers is None
