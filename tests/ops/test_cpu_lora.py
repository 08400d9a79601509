"""Adapters over the compiled kernels, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from tests.ops.test_lora import (
    OUT_FEATURES,
    WIDTHS,
    in_panels,
    make_adapter,
    make_layer,
    test_each_row_has_its_own_adapter,
    test_some_rows_of_a_step_and_float32_outputs,
    test_the_last_adapter_of_a_slot_counts_and_an_empty_slot_adds_nothing,
)
from tests.support.cpu_kernels import kernels, require_cpu_kernels

require_cpu_kernels()

__all__ = [
    "kernels",
    "test_each_row_has_its_own_adapter",
    "test_some_rows_of_a_step_and_float32_outputs",
    "test_the_last_adapter_of_a_slot_counts_and_an_empty_slot_adds_nothing",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    kernels: KernelBackend, dtype: torch.dtype, num_threads: int
) -> None:
    inputs = 1100
    adapters = {slot: make_adapter(slot, inputs, {0: 16, 1: 8 + slot, 2: 16}, dtype) for slot in range(3)}
    batch, layer = make_layer(kernels, inputs, adapters)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, 3, (70,), generator=generator).int()
    x = torch.randn(70, inputs, generator=generator).to(dtype)
    before = torch.randn(70, OUT_FEATURES, generator=generator).to(dtype)
    output = before.clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        batch.set(slots)
        layer.add(x, output)
    finally:
        torch.set_num_threads(threads)
    for row in range(0, 70, 7):
        batch.set(slots[row : row + 1].contiguous())
        alone = before[row : row + 1].clone()
        layer.add(x[row : row + 1].contiguous(), alone)
        assert torch.equal(alone[0], output[row])


def test_what_does_not_fit_the_layer_is_refused(kernels: KernelBackend) -> None:
    batch, layer = make_layer(kernels, 32, {})
    a, b = torch.zeros(32, 16), in_panels(torch.zeros(WIDTHS[0], 4))
    layer.set(0, a, [b], [0], [WIDTHS[0]], [1.0])
    for wrong in (
        (0, a[:31].contiguous(), [b], [0], [WIDTHS[0]], [1.0]),
        (0, torch.zeros(32, 4), [b], [0], [WIDTHS[0]], [1.0]),
        (0, a, [b], [OUT_FEATURES - 1], [WIDTHS[0]], [1.0]),
        (0, a, [b.bfloat16()], [0], [WIDTHS[0]], [1.0]),
        (0, a, [b], [0, 1], [WIDTHS[0]], [1.0]),
        (-1, a, [b], [0], [WIDTHS[0]], [1.0]),
    ):
        with pytest.raises(RuntimeError):
            layer.set(*wrong)
    batch.set(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="for 3 rows, not 2"):
        layer.add(torch.zeros(2, 32), torch.zeros(2, OUT_FEATURES))
