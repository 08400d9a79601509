from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

from pagoda_kernels.gpu.operators import BACKEND  # noqa: E402

__all__ = ["kernels"]
# Infinity, as on a GPU, and then 1 / infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
REFERENCE = reference.BACKEND


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (3, 48), (5, 3, 16)])
def test_rms_norm(kernels: KernelBackend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    normed, stream = kernels.rms_norm(x, weight, 1e-6)
    assert_near(normed, REFERENCE.rms_norm(x, weight, 1e-6, None)[0])
    assert stream is x


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_adds_the_residual_first(kernels: KernelBackend, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(4, 40).to(dtype), torch.randn(4, 40).to(dtype) * 3, torch.randn(40).to(dtype)
    before = x.clone(), residual.clone()
    normed, stream = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(stream, before[0] + before[1])
    assert_near(normed, REFERENCE.rms_norm(x, weight, 1e-5, residual)[0])
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rms_norm_of_heads_in_a_projection(kernels: KernelBackend) -> None:
    heads = torch.randn(3, 6, 16)[:, 2:4]
    assert_near(kernels.rms_norm(heads, torch.randn(16), 1e-6)[0] * 0 + 1, torch.ones(3, 2, 16))
    weight = torch.randn(16)
    assert_near(kernels.rms_norm(heads, weight, 1e-6)[0], REFERENCE.rms_norm(heads, weight, 1e-6, None)[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [12, 1100])
def test_gated_activations(kernels: KernelBackend, dtype: torch.dtype, size: int) -> None:
    x = torch.randn(2, 2 * size).to(dtype) * 3
    assert_near(kernels.silu_and_mul(x), REFERENCE.silu_and_mul(x))
    assert_near(kernels.gelu_and_mul(x), REFERENCE.gelu_and_mul(x))
    expected = F.gelu(x[:, :size].double(), approximate="tanh") * x[:, size:].double()
    torch.testing.assert_close(REFERENCE.gelu_and_mul(x).double(), expected, rtol=4e-3, atol=4e-3)


def test_gated_activation_of_large_values_does_not_overflow(kernels: KernelBackend) -> None:
    x = torch.tensor([[-1e4, 1e4, 100.0, 2.0, 2.0, 2.0]])
    assert torch.equal(kernels.silu_and_mul(x), torch.tensor([[0.0, 2e4, 200.0]]))
    assert torch.equal(kernels.gelu_and_mul(x), torch.tensor([[0.0, 2e4, 200.0]]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 16), (5, 1, 20), (3, 3, 64)])
def test_queries_are_turned_and_keys_and_values_stored(
    kernels: KernelBackend, dtype: torch.dtype, has_norm: bool, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    num_tokens, eps = 4, 1e-6
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    before = heads.clone()
    parts = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = torch.randn(num_tokens, head_dim // 2) * 3
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norm else (None, None)
    slots = torch.tensor([4 * 5 + 3, 4 * 2, 4 * 2 + 1, 0])

    def caches() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (6, num_kv_heads, 4, head_dim)
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    written, expected_written = caches(), caches()
    query = kernels.rotate_and_store(*parts, angles.cos(), angles.sin(), *norms, eps, *written, slots)
    expected = REFERENCE.rotate_and_store(*parts, angles.cos(), angles.sin(), *norms, eps, *expected_written, slots)
    assert torch.equal(heads, before)
    assert_near(query, expected)
    for actual, cache in zip(written, expected_written, strict=True):
        assert_near(actual, cache)
    assert written[0].abs().amax(dim=(1, 3)).count_nonzero() == 4  # four slots, and no other


def stored_as_float8(
    kernels: KernelBackend, heads: torch.Tensor, dtype: torch.dtype, kv_scales: tuple[float, float]
) -> list[torch.Tensor]:
    """Caches of two blocks of four after `heads`, a query, a key and a value a token, have gone into slots 5, 6, …"""
    caches = [torch.zeros(2, 1, 4, heads.shape[2]).to(dtype) for _ in range(2)]
    angles = torch.zeros(len(heads), heads.shape[2] // 2)
    slots = torch.arange(len(heads)) + 5
    query, key, value = heads.split(1, dim=1)
    kernels.rotate_and_store(query, key, value, angles.cos(), angles.sin(), None, None, 1e-6, *caches, slots, kv_scales)
    return caches


@pytest.mark.parametrize("either", [BACKEND, REFERENCE], ids=["triton", "reference"])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_float8_cache_saturates(either: KernelBackend, dtype: torch.dtype, largest: float) -> None:
    heads = torch.tensor([[1e9, -1e9], [1.0, -2.0], [largest * 0.5, 3.0]]).view(1, 3, 2)
    keys, values = stored_as_float8(either, heads, dtype, (0.25, 0.5))
    assert keys[1, 0, 1].float().tolist() == [4.0, -8.0]
    assert values[1, 0, 1].float().tolist() == [largest, 6.0]
    assert keys.float().count_nonzero() == 2


@pytest.mark.parametrize("either", [BACKEND, REFERENCE], ids=["triton", "reference"])
def test_float8_cache_keeps_nan(either: KernelBackend) -> None:
    heads = torch.tensor([[1.0, 1.0], [torch.nan, -2.0], [3.0, torch.nan]]).view(1, 3, 2)
    keys, values = stored_as_float8(either, heads, torch.float8_e5m2, (1.0, 1.0))
    assert keys[1, 0, 1].float().isnan().all()  # the rotation mixes a pair
    assert values[1, 0, 1].float().isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_cache_rounds_to_nearest(dtype: torch.dtype) -> None:
    """Beside float64: of two neighbours that a float8 type has, the nearer one. The interpreter loses the carry where rounding
    up fills the fraction, so no fraction here is near its end; and ties, which it rounds away from zero, are left out."""
    epsilon = torch.finfo(dtype).eps
    steps = torch.arange(0, 1 - 2 * epsilon, epsilon)  # fractions that the type holds
    parts = torch.tensor([0.0, 0.2, 0.45, 0.55, 0.8]) * epsilon
    fractions = (1 + steps[:, None] + parts).flatten()
    numbers = torch.cat([sign * power * fractions for sign in (1.0, -1.0) for power in (0.5, 1.0, 8.0)])
    numbers = numbers[: len(numbers) // 2 * 2]
    nearest = ((numbers.double() / epsilon / exponent_of(numbers)).round() * epsilon * exponent_of(numbers)).float()
    heads = numbers.expand(1, 3, -1) * torch.tensor([1.0, 0.25, 3.0]).view(1, 3, 1)
    for either in (BACKEND, REFERENCE):
        keys, values = stored_as_float8(either, heads, dtype, (0.25, 3.0))
        assert torch.equal(keys[1, 0, 1].float(), nearest)
        assert torch.equal(values[1, 0, 1].float(), nearest)


def exponent_of(numbers: torch.Tensor) -> torch.Tensor:
    """The power of two at or below each number, float64."""
    return 2.0 ** numbers.double().abs().log2().floor()
