"""Grouped experts: the Triton kernels in the interpreter against torch, and the bits of a row in any company."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference import BACKEND
from pagoda_kernels.types import ExpertWeights
from tests.support.triton_kernels import kernels, require_interpreter

__all__ = ["kernels"]
require_interpreter()

HIDDEN, SIZE = 72, 40


def experts_of(
    num_experts: int, dtype: torch.dtype, *, has_bias: bool = False, activation: int = 0, first_expert: int = 0
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return ExpertWeights(
        gate_up=random(num_experts, 2 * SIZE, HIDDEN),
        down=random(num_experts, HIDDEN, SIZE),
        gate_up_bias=random(num_experts, 2 * SIZE) if has_bias else None,
        down_bias=random(num_experts, HIDDEN) if has_bias else None,
        activation=activation,
        first_expert=first_expert,
    )


def routed(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Tokens, their weights and their experts, of which some are chosen often and others never."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.arange(num_experts) % 3
    weights, ids = logits.softmax(dim=-1).topk(top_k, dim=-1)
    return x, weights, ids


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (3, 16, 4), (70, 2, 1), (150, 6, 3), (5, 3, 3)]
)
@pytest.mark.parametrize(("activation", "has_bias"), [(0, False), (1, True), (2, True)])
def test_kernels_compute_what_torch_does(
    kernels: KernelBackend, num_tokens: int, num_experts: int, top_k: int, activation: int, has_bias: bool
) -> None:
    experts = experts_of(num_experts, torch.float32, has_bias=has_bias, activation=activation)
    x, weights, ids = routed(num_tokens, num_experts, top_k, torch.float32)
    expected = BACKEND.grouped_experts(x, weights, ids, experts)
    torch.testing.assert_close(kernels.grouped_experts(x, weights, ids, experts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16])  # of bfloat16 the interpreter multiplies the bits
def test_half_precision_is_rounded_where_torch_rounds(kernels: KernelBackend, dtype: torch.dtype) -> None:
    experts = experts_of(6, dtype)
    x, weights, ids = routed(33, 6, 2, dtype)
    actual, expected = (each.grouped_experts(x, weights, ids, experts) for each in (kernels, BACKEND))
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    assert actual.dtype == torch.float32


def test_ranks_that_have_some_experts_each_add_up_to_all(kernels: KernelBackend) -> None:
    whole = experts_of(7, torch.float32, has_bias=True)
    x, weights, ids = routed(40, 7, 3, torch.float32)
    parts = []
    for first, end in ((0, 3), (3, 3), (3, 7)):
        assert whole.gate_up_bias is not None
        assert whole.down_bias is not None
        if first == end:
            continue
        parts.append(
            ExpertWeights(
                gate_up=whole.gate_up[first:end].contiguous(),
                down=whole.down[first:end].contiguous(),
                gate_up_bias=whole.gate_up_bias[first:end].contiguous(),
                down_bias=whole.down_bias[first:end].contiguous(),
                activation=0,
                first_expert=first,
            )
        )
    for backend in (kernels, BACKEND):
        total = sum(backend.grouped_experts(x, weights, ids, part) for part in parts)
        torch.testing.assert_close(total, BACKEND.grouped_experts(x, weights, ids, whole), rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_company(kernels: KernelBackend) -> None:
    experts = experts_of(4, torch.float32)
    x, weights, ids = routed(140, 4, 2, torch.float32)
    together = kernels.grouped_experts(x, weights, ids, experts)
    for rows in (slice(0, 1), slice(7, 9), slice(60, 131)):
        alone = kernels.grouped_experts(
            x[rows].contiguous(), weights[rows].contiguous(), ids[rows].contiguous(), experts
        )
        assert torch.equal(alone, together[rows])
