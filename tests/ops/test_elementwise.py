from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pagoda_kernels.interface import KernelBackend

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (7, 48), (5, 3, 16)])
def test_rms_norm_without_residual_keeps_the_input_as_stream(
    kernels: KernelBackend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    before = x.clone()
    normed, stream = kernels.rms_norm(x, weight, 1e-6)
    assert_near(normed, naive_rms_norm(x, weight, 1e-6), dtype)
    assert stream is x
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_adds_the_residual_first(kernels: KernelBackend, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(9, 40).to(dtype), torch.randn(9, 40).to(dtype) * 3, torch.randn(40).to(dtype)
    inputs = x.clone(), residual.clone()
    normed, stream = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(stream, inputs[0] + inputs[1])
    assert_near(normed, naive_rms_norm(stream, weight, 1e-5), dtype)
    assert torch.equal(x, inputs[0])
    assert torch.equal(residual, inputs[1])


def test_rms_norm_of_large_bfloat16_values_does_not_overflow(kernels: KernelBackend) -> None:
    x = torch.full((2, 32), 1e30, dtype=torch.bfloat16)
    normed, _ = kernels.rms_norm(x / 1e12, torch.ones(32, dtype=torch.bfloat16), 1e-6)
    torch.testing.assert_close(normed, torch.ones_like(normed))


def test_rms_norm_of_zeros_is_zero(kernels: KernelBackend) -> None:
    assert torch.equal(kernels.rms_norm(torch.zeros(3, 8), torch.ones(8), 1e-6)[0], torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotary_turns_each_pair_by_its_angle(kernels: KernelBackend, dtype: torch.dtype) -> None:
    fused = torch.randn(6, 9, 16).to(dtype)
    query, key = fused[:, :6], fused[:, 6:8]  # strided, as they come out of a fused projection
    angles = torch.randn(6, 8) * 3
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)
    before = fused.clone()
    outputs = kernels.apply_rotary(query, key, angles.cos(), angles.sin())
    assert torch.equal(fused, before)
    for actual, x in zip(outputs, (query, key), strict=True):
        turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
        assert_near(actual, torch.cat((turned.real, turned.imag), dim=-1), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul_gates_the_second_half(kernels: KernelBackend, dtype: torch.dtype) -> None:
    x = torch.randn(5, 24).to(dtype) * 3
    before = x.clone()
    actual = kernels.silu_and_mul(x)
    assert torch.equal(x, before)
    assert_near(actual, F.silu(x[:, :12].double()) * x[:, 12:].double(), dtype)
