"""What some families' layers ask of every backend: sinks, partial and interleaved rotation, float32 weights of norms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from tests.ops.attention_cases import AttentionCase, make_case
from tests.support.kernel_backends import using_backend

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[KernelBackend]:
    if request.param == "cpu":
        from tests.support.cpu_kernels import require_cpu_kernels

        require_cpu_kernels()
    if request.param == "triton":
        from tests.support.triton_kernels import require_interpreter

        require_interpreter()
    with using_backend(request.param) as kernels:
        yield kernels


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def with_sinks(case: AttentionCase, sinks: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """In float64: a sink is a key that is always seen, whose value is zero."""
    starts = case.metadata.query_start_loc.tolist()
    group = case.query.shape[1] // case.k_cache.shape[1]
    output = torch.empty(case.query.shape, dtype=torch.float64)
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        query = case.query[starts[row] : starts[row + 1]].double()
        distance = (len(keys) - len(query) + torch.arange(len(query)))[:, None] - torch.arange(len(keys))
        hidden = (distance < 0) | (distance >= (sliding_window or len(keys)))
        for head in range(case.query.shape[1]):
            scores = (query[:, head] @ keys[:, head // group].double().T * case.scale).masked_fill(hidden, -math.inf)
            own = sinks[head].double().expand(len(scores), 1)
            weights = torch.cat((scores, own), dim=1).softmax(dim=1)[:, :-1]
            output[starts[row] : starts[row + 1], head] = weights @ values[:, head // group].double()
    return output


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("sinks", [[0.5, -2.0, 3.0, 0.0], [40.0, -40.0, 90.0, -300.0]], ids=["usual", "extreme"])
def test_sinks_take_their_part_of_every_softmax(
    kernels: KernelBackend, sliding_window: int | None, sinks: list[float]
) -> None:
    case = make_case([(1, 1), (1, 17), (1, 64), (3, 3), (5, 30)])
    own = torch.tensor(sinks)
    actual = kernels.paged_attention(
        case.query, case.k_cache, case.v_cache, case.metadata, case.scale, sliding_window, sinks=own
    )
    assert_near(actual, with_sinks(case, own, sliding_window))


def test_sinks_of_contexts_that_are_cut_into_segments(kernels: KernelBackend) -> None:
    case = make_case([(1, 1100), (1, 513), (1, 40)], block_size=16, num_heads=2, num_kv_heads=1)
    sinks = torch.tensor([1.0, 4.0])
    actual = kernels.paged_attention(case.query, case.k_cache, case.v_cache, case.metadata, case.scale, sinks=sinks)
    assert_near(actual, with_sinks(case, sinks, None))


def rotated(x: torch.Tensor, angles: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """In float64, pair by pair."""
    output = x.double().clone()
    half = angles.shape[1]
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, half + pair)
        cos, sin = angles[:, pair].double().cos()[:, None], angles[:, pair].double().sin()[:, None]
        output[..., first] = x[..., first].double() * cos - x[..., second].double() * sin
        output[..., second] = x[..., second].double() * cos + x[..., first].double() * sin
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"),
    [(24, 12, False), (24, 12, True), (24, 24, True), (80, 40, True), (64, 16, False), (20, 0, False), (34, 2, True)],
)
def test_a_part_of_each_head_is_turned_and_the_rest_left(
    kernels: KernelBackend, dtype: torch.dtype, head_dim: int, rotary_dim: int, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(3, 8, head_dim, generator=generator).to(dtype)
    query, key, value = heads.split((4, 2, 2), dim=1)
    angles = torch.randn(3, rotary_dim // 2, generator=generator) * 3
    k_cache, v_cache = torch.zeros(2, 2, 4, head_dim, dtype=dtype), torch.zeros(2, 2, 4, head_dim, dtype=dtype)
    slots = torch.tensor([4, 5, 7])
    turned = kernels.rotate_and_store(
        query, key, value, angles.cos(), angles.sin(), None, None, 1e-6, k_cache, v_cache, slots, None, interleaved
    )
    assert_near(turned, rotated(query, angles, interleaved=interleaved))
    assert_near(k_cache[1, :, [0, 1, 3]].transpose(0, 1), rotated(key, angles, interleaved=interleaved))
    assert torch.equal(v_cache[1, :, [0, 1, 3]].transpose(0, 1), value)
    both = kernels.apply_rotary(query, key, angles.cos(), angles.sin(), interleaved)
    assert torch.equal(both[0], turned)
    assert torch.equal(both[1], k_cache[1, :, [0, 1, 3]].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_float32_norm_weight_is_multiplied_before_the_only_rounding(
    kernels: KernelBackend, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(5, 40, generator=generator).to(dtype) for _ in range(2))
    weight = 1 + torch.randn(40, generator=generator) * 0.3
    normed, stream = kernels.rms_norm(x, weight, 1e-5, residual)
    assert normed.dtype == dtype
    assert torch.equal(stream, x + residual)
    wide = stream.double()
    expected = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    # Half a unit in the last place, and hardly more.
    torch.testing.assert_close(normed.double(), expected, rtol=torch.finfo(dtype).eps * 0.6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_normed_by_float32_weights(kernels: KernelBackend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(2, 4, 16, generator=generator).to(dtype)
    query, key, value = heads.split((2, 1, 1), dim=1)
    weights = [1 + 0.3 * torch.randn(16, generator=generator) for _ in range(2)]
    caches = [torch.zeros(1, 1, 4, 16, dtype=dtype) for _ in range(2)]
    still = torch.zeros(2, 0)
    normed = kernels.rotate_and_store(
        query, key, value, still, still, *weights, 1e-6, *caches, torch.tensor([1, 2]), None
    )
    for actual, x, weight in ((normed, query, weights[0]), (caches[0][0, 0, 1:3].unsqueeze(1), key, weights[1])):
        wide = x.double()
        expected = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps * 0.6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clamped_swiglu_is_gpt_oss_formula(kernels: KernelBackend, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 46, generator=torch.Generator().manual_seed(4)) * 6).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    assert_near(kernels.clamped_swiglu_and_mul(x), (up + 1) * gate * torch.sigmoid(1.702 * gate))


def test_soft_cap_of_logits_does_not_depend_on_where_they_stand(kernels: KernelBackend) -> None:
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(5)) * 50
    capped = logits.clone()
    kernels.soft_cap(capped, 30.0)
    torch.testing.assert_close(capped.double(), 30 * torch.tanh(logits.double() / 30), rtol=2e-6, atol=2e-5)
    if kernels.name == "cpu":
        alone = logits[3:4].clone()
        kernels.soft_cap(alone, 30.0)
        assert torch.equal(alone[0], capped[3])
