from __future__ import annotations

import pytest
import torch

from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.packed_weights import empty_packed, pack_into
from pagoda_kernels.reference.linear import _quantized_and_back, unpack
from pagoda_kernels.types import PackedWeight
from tests.ops.packed_cases import ROWS, SHAPES, make_inputs, make_weight
from tests.ops.test_packed_linear import (
    test_extreme_int8_values_do_not_saturate,
    test_inputs_of_zero_give_the_bias,
    test_product_matches_float64,
    test_quantized_product_is_that_of_quantized_inputs,
    test_rows_are_those_of_the_weight,
    test_unpacking_gives_the_weight_back,
)
from tests.support.cpu_kernels import kernels, require_cpu_kernels
from tests.support.packed_weights import pack, quantize_int4, quantize_int8, with_block_scales, with_mins

require_cpu_kernels()

__all__ = [
    "kernels",
    "test_extreme_int8_values_do_not_saturate",
    "test_inputs_of_zero_give_the_bias",
    "test_product_matches_float64",
    "test_quantized_product_is_that_of_quantized_inputs",
    "test_rows_are_those_of_the_weight",
    "test_unpacking_gives_the_weight_back",
]


FLOATS = ("float32", "bfloat16")
QUANTIZED = ("int8", "int4", "int4 with mins", "int8 with mins", "int4 blocks with mins", "int8 blocks")


def packed_weights(out_features: int, in_features: int) -> dict[str, PackedWeight]:
    weight = make_weight(out_features, in_features)
    return {
        "float32": pack(weight),
        "bfloat16": pack(weight.bfloat16()),
        "int8": quantize_int8(weight),
        "int4": quantize_int4(weight, 8),
        "int4 with mins": with_mins(quantize_int4(weight, 8)),
        "int8 with mins": with_mins(quantize_int8(weight)),
        "int4 blocks with mins": with_block_scales(quantize_int4(weight, 8)),
        "int8 blocks": with_block_scales(quantize_int8(weight)),
    }


@pytest.mark.parametrize("kind", FLOATS + QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernels: KernelBackend, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = packed_weights(*shape)[kind]
        x = make_inputs(130, shape[1], dtype)
        whole = kernels.packed_linear(x, weight)
        for first, last in [(0, 1), (5, 7), (3, 16), (100, 130), (129, 130), (0, 97)]:
            assert torch.equal(kernels.packed_linear(x[first:last], weight), whole[first:last]), (shape, first, last)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_number_of_threads_changes_no_bit(kernels: KernelBackend, kind: str) -> None:
    weight = packed_weights(600, 256)[kind]
    x = make_inputs(40, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = kernels.packed_linear(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(kernels.packed_linear(x, weight), single)
    finally:
        torch.set_num_threads(before)


def test_weights_that_bfloat16_holds_give_the_same_bits_from_half_the_memory(kernels: KernelBackend) -> None:
    weight = make_weight(70, 136, torch.bfloat16)
    narrow, wide = pack(weight), pack(weight.float())
    assert narrow.nbytes == wide.nbytes / 2
    for rows in ROWS:
        x = make_inputs(rows, 136)
        assert torch.equal(kernels.packed_linear(x, narrow), kernels.packed_linear(x, wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_equals_the_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make_weight(*shape, dtype)
        packed, expected = pack(weight), empty_packed(*shape, dtype)
        reference.BACKEND.pack(weight.to(packed.values.dtype), expected.values)
        assert torch.equal(packed.values, expected.values)
        in_chunks = empty_packed(*shape, dtype)
        for start in range(0, shape[0], 64):
            pack_into(in_chunks, start, weight[start : start + 64])
        assert torch.equal(in_chunks.values, expected.values)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_product_is_near_the_reference(kernels: KernelBackend, kind: str) -> None:
    weight = packed_weights(129, 1040)[kind]
    x = make_inputs(20, 1040)
    # Sums in float64: those of float32, of numbers in the thousands, differ by more with torch's number of threads.
    expected = _quantized_and_back(x, weight.group_size).double() @ unpack(weight).double().T
    torch.testing.assert_close(kernels.packed_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-2)


def test_what_does_not_fit_is_refused_by_name(kernels: KernelBackend) -> None:
    weight = pack(make_weight(40, 16))
    with pytest.raises(RuntimeError, match="weight has shape"):
        kernels.packed_linear(make_inputs(2, 18), weight)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16, not Half"):
        kernels.packed_linear(make_inputs(2, 16, torch.float16), weight)
    with pytest.raises(RuntimeError, match="id 40 is not between 0 and 39"):
        kernels.packed_rows(weight, torch.tensor([0, 40]), torch.float32)
