"""The gated delta net: the compiled operator against the one in torch, and the bits of a row in any chunks and company."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.reference import BACKEND
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.delta_net_cases import SHAPES, Sequence, Shape, new_states, run, weights_of

require_cpu_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_operator_computes_what_the_one_in_torch_does(shape: Shape, dtype: torch.dtype) -> None:
    compiled, weights = require_cpu_kernels(), weights_of(shape)
    sequences = [
        Sequence(shape, length, blocks, dtype, seed)
        for seed, (length, blocks) in enumerate([(20, [3, 1, 2]), (1, [4]), (33, [9, 8, 7, 6, 5])])
    ]
    ours, theirs = new_states(shape, apart=5), new_states(shape)
    for begin, end in ((0, 1), (1, 8), (8, 16), (16, 20), (20, 33)):
        rows = [(each, begin, min(end, len(each.gates))) for each in sequences if begin < len(each.gates)]
        actual = torch.cat(run(compiled, weights, ours, rows))
        expected = torch.cat(run(BACKEND, weights, theirs, rows))
        tolerance = 2e-5 if dtype is torch.float32 else 0.04
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_row_has_the_same_bits_in_any_chunks_and_company(shape: Shape, dtype: torch.dtype) -> None:
    kernels, weights = require_cpu_kernels(), weights_of(shape)
    one = Sequence(shape, 37, [11, 3, 7, 2, 5], dtype, 0)
    other = Sequence(shape, 30, [20, 21, 22, 23], dtype, 1)
    alone = new_states(shape)
    (expected,) = run(kernels, weights, alone, [(one, 0, 37)])
    chunked, outputs, begin = new_states(shape), [], 0
    for end, other_end in ((1, 5), (8, 6), (9, 16), (24, 29), (25, 30), (37, None)):
        rows = [(one, begin, end)]
        if other_end is not None:
            rows.insert(0, (other, {5: 0, 6: 5, 16: 6, 29: 16, 30: 29}[other_end], other_end))
        outputs.append(run(kernels, weights, chunked, rows)[-1])
        begin = end
    assert torch.equal(torch.cat(outputs), expected)
    for block in one.blocks:
        for own, whole in zip(chunked, alone, strict=True):
            assert torch.equal(own[block], whole[block]), "the state at the end of a block"


def test_a_full_block_is_a_state_that_others_go_on_from() -> None:
    """Two sequences continue one prefix, in one step and not in the order of the prefix."""
    shape = Shape(interleaved=True)
    kernels, weights = require_cpu_kernels(), weights_of(shape)
    whole = Sequence(shape, 24, [1, 2, 3], torch.float32, 0)
    states = new_states(shape)
    (expected,) = run(kernels, weights, states, [(whole, 0, 24)])
    before = [each[2].clone() for each in states]
    again = Sequence(shape, 24, [0, 2, 9], torch.float32, 0)
    fresh = Sequence(shape, 3, [12], torch.float32, 4)
    results = run(kernels, weights, states, [(fresh, 0, 3), (again, 16, 24)])
    assert torch.equal(results[1], expected[16:])
    assert all(torch.equal(each[2], old) for each, old in zip(states, before, strict=True))
