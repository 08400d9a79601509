"""Memory for what every step reads from one end to the other: weights and KV caches, on huge pages where the system has them.

A processor prefetches within a page and looks up every page's address, so from pages of 4 KiB memory is read a tenth more
slowly than from those of 2 MiB. Linux provides them on request (`transparent_hugepage` is `madvise` or `always`).
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

HUGE_PAGE_BYTES = 2 << 20
_REGION_BYTES = 64 << 20  # mapped at once, so that tensors smaller than a huge page share one
_SMALLEST_BYTES = 64 << 10  # tensors below are torch's own
_ALIGNMENT = 64
_MADV_POPULATE_WRITE = 23  # <linux/mman.h>; Python's mmap does not name it

# Called through ctypes, which lets other threads of Python run meanwhile; mmap.madvise does not.
libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def empty_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor without values, contiguous, aligned to 64 bytes.

    On ordinary pages where it is small or the system has no huge ones. Raises `MemoryError` where there is no address space.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    return _arena.take(num_bytes).view(dtype).view(shape)


def zeros_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of zeros, contiguous, on pages as `empty_on_huge_pages`, which take memory when written or populated."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    return map_region(num_bytes)[:num_bytes].view(dtype).view(shape)


def populate(tensor: torch.Tensor) -> None:
    """Take the memory of a contiguous CPU tensor's pages now, whatever they hold, also while others read and write them.

    Raises `OSError`: EINVAL where the system cannot do so (Linux can since 5.14), ENOMEM or EFAULT where memory is short.
    """
    begin = tensor.data_ptr() & -mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    if libc is None:
        raise OSError(errno.EINVAL, "this system has no madvise(2)")
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise(MADV_POPULATE_WRITE): {os.strerror(number)}")


def release_region() -> None:
    """Cut no more tensors from the region in use, so that it is freed with those that were."""
    _arena.release()


class _Arena:
    """Cuts tensors from regions, one after the other; a region is freed with its last tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def release(self) -> None:
        """Begin a new region with the next tensor."""
        with self._lock:
            self._region = torch.empty(0, dtype=torch.uint8)
            self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next `num_bytes` bytes, uint8."""
        if num_bytes > _REGION_BYTES:
            return map_region(num_bytes)[:num_bytes]
        with self._lock:
            if self._used + num_bytes > len(self._region):
                self._region, self._used = map_region(_REGION_BYTES), 0
            begin, end = self._used, self._used + num_bytes
            self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
            return self._region[begin:end]


def map_region(num_bytes: int) -> torch.Tensor:
    """Fresh memory, at least `num_bytes` from a huge page's beginning on; it takes no physical memory before it is written."""
    size = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        # MAP_PRIVATE: shared memory, the default, has other rules for huge pages.
        memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no address space for {size} bytes: {error}") from error
    with suppress(OSError):  # a kernel without huge pages: ordinary ones do as well, more slowly
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[begin : begin + size]


_arena = _Arena()
