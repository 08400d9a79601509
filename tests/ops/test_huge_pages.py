from __future__ import annotations

import gc
import mmap

import pytest
import torch

from pagoda_kernels.huge_pages import empty_on_huge_pages, populate, zeros_on_huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3,), (300, 7, 100), (5000, 1000)])
def test_tensor_has_its_shape_and_is_aligned(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty_on_huge_pages(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0


def test_tensors_never_share_a_byte() -> None:
    tensors = [empty_on_huge_pages((size,), torch.uint8) for size in (70_001, 1 << 20, 65 << 20, 70_001, 63 << 20)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number).all())


def test_memory_of_a_great_tensor_is_given_back_with_it() -> None:
    tensor = empty_on_huge_pages((65 << 20,), torch.uint8)
    address = tensor.data_ptr()

    def is_mapped() -> bool:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            ranges = [line.split()[0].split("-") for line in maps]
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)

    assert is_mapped()
    del tensor
    gc.collect()
    assert not is_mapped()


def test_a_tensor_outlives_the_others_of_its_region() -> None:
    first = empty_on_huge_pages((100_000,), torch.uint8)
    second = empty_on_huge_pages((100_000,), torch.uint8).fill_(7)
    del first
    gc.collect()
    assert bool((second == 7).all())


@pytest.mark.parametrize("shape", [(3,), (300, 7, 100), (9_000_000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_zeros_are_zeros_and_take_their_memory_when_populated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before = resident_bytes()
    tensor = zeros_on_huge_pages(shape, dtype)
    assert resident_bytes() - before < 1 << 20
    populate(tensor)
    taken = resident_bytes() - before
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.nbytes < 1 << 20 or taken > 0.9 * tensor.nbytes
    assert not bool(tensor.float().any())


def test_populating_changes_nothing() -> None:
    tensor = zeros_on_huge_pages((1 << 20,), torch.uint8)
    tensor[::1000] = 7
    populate(tensor[100:])
    assert int(tensor.long().sum()) == 7 * len(tensor[::1000])


def test_memory_that_is_not_there_is_not_populated() -> None:
    class Unmapped:
        nbytes = 1 << 20

        def data_ptr(self) -> int:
            return 1 << 46

    with pytest.raises(OSError, match="Cannot allocate memory"):
        populate(Unmapped())  # type: ignore[arg-type]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="utf-8") as pages:
        return int(pages.read().split()[1]) * mmap.PAGESIZE
