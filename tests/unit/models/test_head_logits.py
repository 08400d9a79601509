"""Logits in half precision: float32, from float32 sums, however the head's weight is kept and multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.layers.linear import (
    CublasFloat32OutputMethod,
    UnquantizedLinearMethod,
    UpcastFloat32OutputMethod,
    unquantized_method,
)
from pagoda.models.loading.loader import load_weights
from pagoda_kernels import backend
from tests.support.cpu_kernels import ALL_LEVELS, cpu_kernels_at, require_cpu_kernels

require_cpu_kernels()

SPEC = DummySpec(num_layers=1, dtype="bfloat16")
LOW, HIGH = 100, 400  # ids of the two best tokens; the second is better, by less than bfloat16 can tell


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    """Two rows, of which the first has the two best tokens."""
    return torch.randn(2, SPEC.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, hidden: torch.Tensor) -> Path:
    directory = write_dummy_checkpoint(tmp_path_factory.mktemp("head") / "model", SPEC)
    tensors = load_file(directory / "model.safetensors")
    best = hidden[0].float()
    first = (best * 10 / best.square().sum()).bfloat16()
    second = first.clone()
    place = int(best.abs().argmin())
    second[place] *= 1.25
    tensors["lm_head.weight"][LOW], tensors["lm_head.weight"][HIGH] = first, second
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def weight(checkpoint: Path) -> torch.Tensor:
    return load_file(checkpoint / "model.safetensors")["lm_head.weight"]


@pytest.fixture(params=("reference", *ALL_LEVELS))
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[DecoderForCausalLM]:
    """In bfloat16: unpacked, and packed on each instruction set."""
    if request.param == "reference":
        before = backend.active
        backend.use_backend("reference")
        yield loaded(checkpoint, torch.bfloat16, packed=False)
        backend.active = before
        return
    with cpu_kernels_at(request.param):
        yield loaded(checkpoint, torch.bfloat16, packed=True)


def loaded(directory: Path, dtype: torch.dtype, *, packed: bool) -> DecoderForCausalLM:
    model = build_model(ModelConfig.from_directory(directory), dtype, packed=packed)
    load_weights(model, directory)
    return model


@torch.inference_mode()
def logits_of(model: DecoderForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    logits = model.compute_logits(hidden)
    assert logits is not None
    return logits


def test_two_best_tokens_are_a_tie_in_bfloat16(weight: torch.Tensor, hidden: torch.Tensor) -> None:
    rounded = F.linear(hidden, weight)[0]
    assert rounded[LOW] == rounded[HIGH] == rounded.max()


def test_better_of_two_near_tokens_is_the_greatest_logit(model: DecoderForCausalLM, hidden: torch.Tensor) -> None:
    logits = logits_of(model, hidden)
    assert logits.dtype == torch.float32
    assert logits[0].argmax() == HIGH
    assert logits[0, LOW] < logits[0, HIGH]


def test_logits_are_the_product_in_float32(
    model: DecoderForCausalLM, weight: torch.Tensor, hidden: torch.Tensor
) -> None:
    expected = (hidden.double() @ weight.double().T).float()
    torch.testing.assert_close(logits_of(model, hidden), expected, rtol=0, atol=1e-5)


def test_float16_has_them_too(checkpoint: Path, weight: torch.Tensor, hidden: torch.Tensor) -> None:
    model = loaded(checkpoint, torch.float16, packed=False)
    expected = (hidden.half().double() @ weight.half().double().T).float()
    torch.testing.assert_close(logits_of(model, hidden.half()), expected, rtol=0, atol=1e-5)


def test_quantized_head_does_not_round_its_sums(checkpoint: Path, hidden: torch.Tensor) -> None:
    from pagoda.models.quantization.schemes import choose_quantization

    config = ModelConfig.from_directory(checkpoint)
    quantization = choose_quantization("int8", None, None, config.linear_input_sizes)
    logits = {}
    with cpu_kernels_at("avx2"):
        for dtype in (torch.bfloat16, torch.float32):
            model = build_model(config, dtype, quantization=quantization, packed=True)
            load_weights(model, checkpoint)
            logits[dtype] = logits_of(model, hidden.to(dtype))
    assert torch.equal(logits[torch.bfloat16], logits[torch.float32])


def test_weight_is_upcast_in_pieces(monkeypatch: pytest.MonkeyPatch, hidden: torch.Tensor) -> None:
    monkeypatch.setattr("pagoda.models.layers.linear._UPCAST_ELEMENTS", 10 * SPEC.hidden_size)
    weight = torch.randn(37, SPEC.hidden_size).bfloat16()
    product = UpcastFloat32OutputMethod().multiply(hidden, weight)
    torch.testing.assert_close(product, hidden.float() @ weight.float().T, rtol=0, atol=1e-5)


def test_gpu_asks_its_library_for_float32() -> None:
    """On the device `meta` torch checks the call as it would for a GPU: no copy of the weight is made."""
    method = unquantized_method(torch.bfloat16, torch.float32, torch.device("cuda"))
    assert isinstance(method, CublasFloat32OutputMethod)
    x, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (3, 512))
    product = method.multiply(x, weight)
    assert (product.dtype, product.shape, product.stride()) == (torch.float32, (3, 512), (512, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_product_is_the_one_in_float32(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(rows, 1024, device="cuda").to(dtype) for rows in (3, 4000))
    product = CublasFloat32OutputMethod().multiply(x, weight)
    torch.testing.assert_close(product.double(), x.double() @ weight.double().T, rtol=0, atol=1e-3)


def test_float32_model_and_other_layers_keep_torch_s_product() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert type(unquantized_method(dtype, dtype, cpu)) is UnquantizedLinearMethod
    with pytest.raises(ValueError, match=r"torch\.float16 layers are torch\.float16 or torch\.float32"):
        unquantized_method(torch.float16, torch.bfloat16, cpu)
