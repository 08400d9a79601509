"""Packed weights on the reference backend; test_cpu_linear.py runs the same over the compiled kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from pagoda_kernels.reference.linear import unpack
from tests.ops.packed_cases import ROWS, SHAPES, make_inputs, make_weight
from tests.support.packed_weights import (
    pack,
    pack_int4,
    pack_int8,
    quantize_int4,
    quantize_int8,
    with_block_scales,
    with_mins,
)

FLOAT_TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_unpacking_gives_the_weight_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_weight(*shape, dtype)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert packed.values.dtype == dtype


def test_odd_number_of_inputs_is_packed_as_float32() -> None:
    packed = pack(make_weight(40, 9, torch.bfloat16))
    assert packed.values.dtype == torch.float32
    assert torch.equal(unpack(packed), make_weight(40, 9, torch.bfloat16).float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_dtype", FLOAT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_product_matches_float64(
    kernels: KernelBackend, shape: tuple[int, int], rows: int, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight, x = make_weight(*shape, weight_dtype), make_inputs(rows, shape[1], dtype)
    bias = make_inputs(1, shape[0], dtype)[0]
    expected = x.double() @ weight.double().T
    scale = max(1.0, shape[1] ** 0.5)
    product = kernels.packed_linear(x, pack(weight))
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    with_bias = kernels.packed_linear(x, pack(weight), bias)
    torch.testing.assert_close(
        with_bias.double(), expected + bias.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("weight_dtype", FLOAT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rows_are_those_of_the_weight(kernels: KernelBackend, weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight = make_weight(70, 40, weight_dtype)
    ids = torch.tensor([0, 69, 31, 32, 33, 0])
    assert torch.equal(kernels.packed_rows(pack(weight), ids, dtype), weight[ids].to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_the_weight(shape: tuple[int, int]) -> None:
    weight = make_weight(*shape)
    packed = quantize_int8(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((unpack(packed) - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("group_size", [8, 16, 40])
def test_int4_is_within_a_step_of_the_weight_and_holds_zero(group_size: int) -> None:
    weight = make_weight(70, 80)
    weight[3], weight[:, 5] = 0.0, 0.0
    packed = quantize_int4(weight, group_size)
    groups = weight.view(70, -1, group_size)
    step = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    assert ((unpack(packed) - weight).abs().view_as(groups) <= step.unsqueeze(2) * 1.001).all()
    assert (unpack(packed)[weight == 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    "kind", ["int8", "int4", "int4 without zeros", "int8 with mins", "int4 with mins", "int4 halves", "int4 blocks"]
)
def test_quantized_product_is_that_of_quantized_inputs(
    kernels: KernelBackend, shape: tuple[int, int], rows: int, dtype: torch.dtype, kind: str
) -> None:
    out_features, in_features = shape
    weight, x = make_weight(*shape), make_inputs(rows, in_features, dtype)
    group_size = in_features if kind == "int8" else 8
    if kind == "int8":
        packed = quantize_int8(weight)
    elif kind == "int4":
        packed = quantize_int4(weight, group_size)
    elif kind == "int8 with mins":
        values = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(2)).to(torch.int8)
        packed = with_mins(pack_int8(values, torch.rand(out_features) + 0.1))
        group_size = in_features
    elif kind == "int4 with mins":
        packed = with_mins(quantize_int4(weight, group_size), torch.float32)
    elif kind == "int4 blocks":
        packed = with_block_scales(quantize_int4(weight, group_size))
    elif kind == "int4 halves":
        packed = quantize_int4(weight, group_size)
        assert packed.scales is not None
        packed = dataclasses.replace(packed, scales=packed.scales.half())
    else:
        values = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        packed = pack_int4(values, torch.rand(out_features, in_features // 8) + 0.1, None, 8)
    groups = x.double().view(rows, -1, group_size)
    scales = groups.abs().amax(2, keepdim=True) / 127
    rounded = ((groups / scales).round() * scales).view(rows, in_features)
    expected = rounded @ unpack(packed).double().T
    bias = make_inputs(1, out_features, dtype)[0]
    product = kernels.packed_linear(x, packed, bias)
    assert product.dtype == dtype
    # A value that lies on the edge of two steps may be rounded either way.
    edge = float(scales.max() * unpack(packed).abs().max())
    tolerance = edge + TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(product.double(), expected + bias.double(), rtol=0, atol=tolerance)


def test_inputs_of_zero_give_the_bias(kernels: KernelBackend) -> None:
    bias = make_inputs(1, 40)[0]
    for packed in (quantize_int8(make_weight(40, 16)), quantize_int4(make_weight(40, 16), 8)):
        assert torch.equal(kernels.packed_linear(torch.zeros(3, 16), packed, bias), bias.expand(3, 40))


def test_extreme_int8_values_do_not_saturate(kernels: KernelBackend) -> None:
    values = torch.full((32, 256), -128, dtype=torch.int8)
    values[1] = 127
    x = torch.ones(2, 256)
    x[1] = -1.0
    product = kernels.packed_linear(x, pack_int8(values, torch.ones(32)))
    torch.testing.assert_close(product[:, :2], torch.tensor([[-128.0, 127.0], [128.0, -127.0]]) * 256)
