"""Mixtures of experts: the operator against the layer written out, the bits of a row in any company, MXFP4, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.layers.moe import MixtureOfExperts
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors
from pagoda.models.loading.loader import initialize_dummy_weights
from pagoda.models.quantization.layouts import read_rows
from pagoda.models.quantization.schemes import WeightScheme, choose_quantization
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config

require_cpu_kernels()

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

NAMES = ("qwen2-moe", "mixtral", "glm4-moe", "gpt-oss", "deepseek-v2")


def config_of(name: str, **overrides: Any) -> ModelConfig:
    return ModelConfig.from_dicts({**family_config(name, **overrides).to_dict(), "architectures": []})


def mixture(name: str, dtype: torch.dtype, kind: str | None, *, fused: bool) -> MixtureOfExperts:
    """The last layer's mixture of a small model with dummy weights."""
    backend.use_backend("cpu")
    sizes = {
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "q_lora_rank": 64,
        "v_head_dim": 32,
    }
    config = config_of(name, hidden_size=128, head_dim=32, **sizes)
    group_size = 32 if kind == "int4" else None
    quantization = choose_quantization(kind, group_size, None, config.linear_input_sizes)
    model = build_model(config, dtype, quantization=quantization, packed=True)
    initialize_dummy_weights(model, std=0.1)
    if fused:
        fuse_layers(model)
    *_, layer = (module for module in model.modules() if isinstance(module, MixtureOfExperts))
    assert (layer.fused is not None) is fused
    return layer


def rows(dtype: torch.dtype, count: int = 37) -> torch.Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_operator_computes_what_the_layer_does(name: str, dtype: torch.dtype, kind: str | None) -> None:
    with torch.inference_mode():
        x = rows(dtype)
        expected = mixture(name, dtype, kind, fused=False)(x).float()
        actual = mixture(name, dtype, kind, fused=True)(x).float()
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, kind: str | None) -> None:
    layer, x = mixture("qwen2-moe", dtype, kind, fused=True), rows(dtype, 150)
    with torch.inference_mode():
        together = layer(x)
        assert torch.equal(layer(x.flip(0)).flip(0), together)
        for start, stop in ((0, 1), (5, 6), (3, 40), (149, 150)):
            assert torch.equal(layer(x[start:stop]), together[start:stop])


def test_mxfp4_is_read_exactly(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    save_file({"w.blocks": blocks[1].contiguous(), "w.scales": scales[1].contiguous()}, tmp_path / "model.safetensors")
    source = StoredTensors(stored_tensors([tmp_path / "model.safetensors"]))
    scheme = WeightScheme(layout="mxfp4", bits=8, group_size=32)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[1].T
    for outputs, inputs in ((slice(0, 6), slice(0, 96)), (slice(2, 5), slice(32, 96))):
        read = read_rows(scheme, "w", outputs, inputs, 96, source)
        ours = (read.values.float() - 128) * read.scales.repeat_interleave(32, dim=1)
        assert torch.equal(ours, theirs[outputs, inputs])


def test_more_experts_than_a_model_can_have_are_refused() -> None:
    with pytest.raises(CheckpointError, match="makes 4194304 experts; at most 131072 are allowed"):
        config_of("mixtral", num_local_experts=4096, num_hidden_layers=1024)


@pytest.mark.parametrize(("name", "key"), [("mixtral", "num_experts_per_tok"), ("glm4-moe", "num_experts_per_tok")])
def test_more_experts_a_token_than_there_are_is_refused(name: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} must be an integer of at least 1 and at most 4, found 5"):
        config_of(name, **{key: 5})
