"""Products of bfloat16 inputs whose sums stay in float32, like the head's: of the reference and of every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from pagoda_kernels import backend
from pagoda_kernels.types import PackedWeight
from tests.ops.packed_cases import ROWS, SHAPES, make_inputs, make_weight
from tests.support.cpu_kernels import ALL_LEVELS, cpu_kernels_at, require_cpu_kernels
from tests.support.packed_weights import pack, quantize_int4, quantize_int8

require_cpu_kernels()

KINDS = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture(params=("reference", *ALL_LEVELS), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "reference":
        before = backend.active
        backend.use_backend("reference")
        yield
        backend.active = before
        return
    with cpu_kernels_at(request.param):
        yield


def packed(kind: str, weight: torch.Tensor) -> PackedWeight:
    if kind == "int8":
        return quantize_int8(weight)
    if kind == "int4":
        return quantize_int4(weight, 8)
    return pack(weight.to(getattr(torch, kind)))


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_same_values_in_float64(shape: tuple[int, int]) -> None:
    weight = make_weight(*shape, torch.bfloat16)
    for rows in ROWS:
        x = make_inputs(rows, shape[1], torch.bfloat16)
        product = backend.active.packed_linear(x, pack(weight), out_dtype=torch.float32)
        assert product.dtype == torch.float32
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=5e-6 * shape[1] ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_it_gives_the_bfloat16_output(kind: str, shape: tuple[int, int]) -> None:
    weight = packed(kind, make_weight(*shape, torch.bfloat16))
    bias = make_inputs(1, shape[0], torch.bfloat16)[0]
    for rows, given in itertools.product(ROWS, (None, bias)):
        x = make_inputs(rows, shape[1], torch.bfloat16)
        wide = backend.active.packed_linear(x, weight, given, torch.float32)
        assert wide.dtype == torch.float32
        assert not torch.equal(wide, wide.bfloat16().float())
        assert torch.equal(wide.bfloat16(), backend.active.packed_linear(x, weight, given))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_product_has_the_bits_of_float32_inputs(kind: str) -> None:
    for out_features, in_features in SHAPES:
        weight = packed(kind, make_weight(out_features, in_features))
        x = make_inputs(13, in_features, torch.bfloat16)
        assert torch.equal(
            backend.active.packed_linear(x, weight, None, torch.float32),
            backend.active.packed_linear(x.float(), weight),
        )


@pytest.mark.parametrize("kernels", ALL_LEVELS, indirect=True)
def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    weight, x = pack(make_weight(129, 1040, torch.bfloat16)), make_inputs(130, 1040, torch.bfloat16)
    whole = backend.active.packed_linear(x, weight, out_dtype=torch.float32)
    for first, last in [(0, 1), (5, 7), (3, 16), (100, 130)]:
        assert torch.equal(
            backend.active.packed_linear(x[first:last], weight, out_dtype=torch.float32), whole[first:last]
        )


@pytest.mark.parametrize("kernels", ["avx2"], indirect=True)
def test_an_output_narrower_than_the_inputs_is_refused() -> None:
    with pytest.raises(RuntimeError, match="out_dtype must be float32 or that of x, not BFloat16"):
        backend.active.packed_linear(make_inputs(2, 16), pack(make_weight(40, 16)), out_dtype=torch.bfloat16)
