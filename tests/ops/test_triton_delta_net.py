"""The gated delta net's Triton kernels in the interpreter: the cases of the compiled operator."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference import BACKEND
from tests.support.delta_net_cases import SHAPES, Sequence, Shape, new_states, run, weights_of
from tests.support.triton_kernels import kernels, require_interpreter

__all__ = ["kernels"]
require_interpreter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_what_torch_does(kernels: KernelBackend, shape: Shape, dtype: torch.dtype) -> None:
    weights = weights_of(shape)
    sequences = [
        Sequence(shape, length, blocks, dtype, seed)
        for seed, (length, blocks) in enumerate([(20, [3, 1, 2]), (1, [4]), (33, [9, 8, 7, 6, 5])])
    ]
    ours, theirs = new_states(shape, apart=5), new_states(shape)
    for begin, end in ((0, 1), (1, 7), (7, 9), (9, 20), (20, 33)):
        rows = [(each, begin, min(end, len(each.gates))) for each in sequences if begin < len(each.gates)]
        actual = torch.cat(run(kernels, weights, ours, rows))
        expected = torch.cat(run(BACKEND, weights, theirs, rows))
        tolerance = 2e-5 if dtype is torch.float32 else 0.04
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
    for own, other in zip(ours, theirs, strict=True):
        tolerance = 1e-4 if dtype is torch.float32 else 2e-3
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_row_has_the_same_bits_in_any_chunks_and_company(kernels: KernelBackend) -> None:
    shape = SHAPES[1]
    weights = weights_of(shape)
    one = Sequence(shape, 26, [11, 3, 7, 2], torch.float32, 0)
    other = Sequence(shape, 9, [20, 21], torch.float32, 1)
    alone, chunked, outputs = new_states(shape), new_states(shape), []
    (expected,) = run(kernels, weights, alone, [(one, 0, 26)])
    for begin, end in ((0, 1), (1, 9), (9, 10), (10, 26)):
        rows = [(one, begin, end)]
        if begin == 1:
            rows.insert(0, (other, 0, 9))
        outputs.append(run(kernels, weights, chunked, rows)[-1])
    assert torch.equal(torch.cat(outputs), expected)
    for block in one.blocks:
        for own, whole in zip(chunked, alone, strict=True):
            assert torch.equal(own[block], whole[block])
