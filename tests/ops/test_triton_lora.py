"""The tests of the reference backend, run over the Triton kernels, and what only these have."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.interface import KernelBackend
from tests.ops.test_lora import (
    OUT_FEATURES,
    check_rows,
    install,
    make_adapter,
    make_layer,
    test_the_last_adapter_of_a_slot_counts_and_an_empty_slot_adds_nothing,
)
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

__all__ = [
    "kernels",
    "test_the_last_adapter_of_a_slot_counts_and_an_empty_slot_adds_nothing",
]


# Triton's interpreter multiplies no bfloat16.
@pytest.mark.parametrize(("inputs", "dtype"), [(7, torch.float32), (1100, torch.float16)])
def test_each_row_has_its_own_adapter(kernels: KernelBackend, inputs: int, dtype: torch.dtype) -> None:
    check_rows(kernels, inputs, torch.float32, dtype, last_rows=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernels: KernelBackend, dtype: torch.dtype) -> None:
    inputs = 600
    adapters = {slot: make_adapter(slot, inputs, {0: 16, 1: 8 + slot, 2: 16}, dtype) for slot in range(3)}
    batch, layer = make_layer(kernels, inputs, adapters, dtype)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, 3, (24,), generator=generator).int()
    x = torch.randn(24, inputs, generator=generator).to(dtype)
    before = torch.randn(24, OUT_FEATURES, generator=generator).to(dtype)
    output = before.clone()
    batch.set(slots)
    layer.add(x, output)
    for row in range(0, 24, 9):
        batch.set(slots[row : row + 1].contiguous())
        alone = before[row : row + 1].clone()
        layer.add(x[row : row + 1].contiguous(), alone)
        assert torch.equal(alone[0], output[row])


def test_what_was_launched_for_any_rows_runs_for_those_that_are_set_later(kernels: KernelBackend) -> None:
    """As in a graph: the launch of the most rows, whose grid and tensors stay, over tables that change."""
    batch, layer = make_layer(kernels, 64, {})
    batch.expect(40)
    grid = batch.num_blocks  # type: ignore[attr-defined]
    x, output = torch.randn(40, 64), torch.zeros(40, OUT_FEATURES)
    layer.add(x, output)
    assert not output.any(), "there are no rows with adapters yet"
    adapters = [make_adapter(seed, 64, {0: 8, 1: 4}, torch.float32) for seed in range(2)]
    for slot, adapter in zip((1, 6), adapters, strict=True):
        install(layer, slot, adapter)
    slots = torch.tensor([6, -1, 1, *[6] * 20], dtype=torch.int32)
    batch.set(slots)
    batch.num_tokens = 40  # type: ignore[attr-defined]  # a replay does not know how many there are
    assert batch.num_blocks == grid  # type: ignore[attr-defined]
    layer.add(x, output)
    for row, slot in enumerate(slots.tolist()):
        expected = torch.zeros(OUT_FEATURES).double() if slot < 0 else adapters[slot // 6].delta(x[row : row + 1])[0]
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert not output[len(slots) :].any()


def test_what_does_not_fit_is_refused(kernels: KernelBackend) -> None:
    batch, layer = make_layer(kernels, 64, {})
    adapter = make_adapter(0, 64, {0: 8}, torch.float32)
    with pytest.raises(RuntimeError, match="slot 8 of 8"):
        install(layer, 8, adapter)
    with pytest.raises(RuntimeError, match=r"A is \[32, 16\]; expected \[64, "):
        install(layer, 0, make_adapter(0, 32, {0: 8}, torch.float32))
    with pytest.raises(RuntimeError, match="are more than max_num_tokens=80"):
        batch.set(torch.zeros(81, dtype=torch.int32))
    batch.set(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="some rows of a step"):
        layer.add(torch.zeros(1, 64), torch.zeros(1, OUT_FEATURES), torch.zeros(1, dtype=torch.int64))
