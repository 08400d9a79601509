"""Adapters of a linear layer on the reference backend; test_cpu_lora.py runs the same over the compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pagoda_kernels.interface import KernelBackend, LoraBatch, LoraLinear
from pagoda_kernels.types import LORA_ALIGNMENT, PANEL, LoraLimits

WIDTHS = (40, 8, 24)  # of the fused layers
OUT_FEATURES = sum(WIDTHS)


@dataclass(frozen=True)
class Adapter:
    """Of each part that has one: its index, A [rank, inputs], B [outputs, rank] and scale."""

    parts: list[tuple[int, torch.Tensor, torch.Tensor, float]]

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """What it adds to rows x, in float64."""
        total = torch.zeros(len(x), OUT_FEATURES, dtype=torch.float64)
        for index, a, b, scale in self.parts:
            first = sum(WIDTHS[:index])
            total[:, first : first + WIDTHS[index]] += scale * (x.double() @ a.double().T) @ b.double().T
        return total


def make_adapter(seed: int, inputs: int, ranks: dict[int, int], dtype: torch.dtype) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Adapter(
        [(part, values(rank, inputs), values(WIDTHS[part], rank), 0.5 + part) for part, rank in ranks.items()]
    )


def padded(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % LORA_ALIGNMENT)).contiguous()


def in_panels(b: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.pad(b, (0, 0, 0, -b.shape[0] % PANEL))
    return rows.view(-1, PANEL, b.shape[1]).transpose(1, 2).contiguous()


def install(layer: LoraLinear, slot: int, adapter: Adapter) -> None:
    layer.set(
        slot,
        padded(torch.cat([a for _, a, _, _ in adapter.parts]).T),
        [in_panels(b) for _, _, b, _ in adapter.parts],
        [sum(WIDTHS[:part]) for part, *_ in adapter.parts],
        [WIDTHS[part] for part, *_ in adapter.parts],
        [scale for *_, scale in adapter.parts],
    )


def make_layer(
    kernels: KernelBackend, inputs: int, adapters: dict[int, Adapter], dtype: torch.dtype = torch.float32
) -> tuple[LoraBatch, LoraLinear]:
    limits = LoraLimits(num_slots=8, max_rank=64, max_num_tokens=80, dtype=dtype, device=torch.device("cpu"))
    batch = kernels.lora_batch(limits)
    layer = kernels.lora_linear(batch, inputs, OUT_FEATURES)
    for slot, adapter in adapters.items():
        install(layer, slot, adapter)
    return batch, layer


@pytest.mark.parametrize("inputs", [7, 512, 1100])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_adapter(
    kernels: KernelBackend, inputs: int, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    check_rows(kernels, inputs, weight_dtype, dtype)


def check_rows(
    kernels: KernelBackend, inputs: int, weight_dtype: torch.dtype, dtype: torch.dtype, last_rows: int = 60
) -> None:
    adapters = {
        0: make_adapter(0, inputs, {0: 8, 1: 8, 2: 8}, weight_dtype),
        2: make_adapter(1, inputs, {0: 16, 2: 3}, weight_dtype),
        5: make_adapter(2, inputs, {1: 64}, weight_dtype),
    }
    batch, layer = make_layer(kernels, inputs, adapters, dtype)
    slots = torch.tensor(
        [5, -1, 0, 2, 0, 0, 3, -1, *[2] * last_rows], dtype=torch.int32
    )  # 3 has nothing for this layer
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(slots), inputs, generator=generator).to(dtype)
    output = torch.randn(len(slots), OUT_FEATURES, generator=generator).to(dtype)
    expected = output.double()
    for row, slot in enumerate(slots.tolist()):
        if slot in adapters:
            expected[row] += adapters[slot].delta(x[row : row + 1])[0]
    batch.set(slots)
    before = output.clone()
    layer.add(x, output)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scale = (inputs * 16) ** 0.5
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance * scale)
    untouched = (slots == -1) | (slots == 3)
    assert torch.equal(output[untouched], before[untouched])


def test_some_rows_of_a_step_and_float32_outputs(kernels: KernelBackend) -> None:
    adapters = {slot: make_adapter(slot, 96, {0: 8, 2: 4}, torch.bfloat16) for slot in range(2)}
    batch, layer = make_layer(kernels, 96, adapters)
    slots = torch.tensor([0, -1, 1, 1, 0], dtype=torch.int32)
    batch.set(slots)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=generator).bfloat16()
    rows = torch.tensor([4, 2, 1, 4])
    output = torch.randn(4, OUT_FEATURES, generator=generator)
    expected = output.double()
    for index, row in enumerate(rows.tolist()):
        if slots[row] >= 0:
            expected[index] += adapters[int(slots[row])].delta(x[row : row + 1])[0]
    layer.add(x[rows].contiguous(), output, rows)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-3)


def test_the_last_adapter_of_a_slot_counts_and_an_empty_slot_adds_nothing(kernels: KernelBackend) -> None:
    first, second = (make_adapter(seed, 32, {0: 4}, torch.float32) for seed in (0, 1))
    batch, layer = make_layer(kernels, 32, {1: first})
    x = torch.randn(2, 32)
    batch.set(torch.tensor([1, -1], dtype=torch.int32))

    def added() -> torch.Tensor:
        output = torch.zeros(2, OUT_FEATURES)
        layer.add(x, output)
        return output

    torch.testing.assert_close(added()[0].double(), first.delta(x)[0], rtol=1e-4, atol=1e-4)
    install(layer, 1, second)
    torch.testing.assert_close(added()[0].double(), second.delta(x)[0], rtol=1e-4, atol=1e-4)
    layer.clear(1)
    layer.clear(7)
    assert not added().any()
    install(layer, 1, first)
    batch.set(None)
    assert not added().any()
