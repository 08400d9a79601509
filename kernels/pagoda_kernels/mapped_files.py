"""Files mapped as tensors: there without reading or copying where the page cache holds them, shared by processes.

Page caches of many file systems consist of pages of 4 KiB, from which products with one row are a quarter slower than from
huge ones. So what is mapped from such can be moved to memory of this process, on huge pages and under the same addresses,
while other threads read it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

from pagoda_kernels.huge_pages import libc, map_region

_MADV_POPULATE_READ = 22  # <linux/mman.h>; Python's mmap does not name it
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4  # <linux/mman.h>
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_PIECE_BYTES = 64 << 20
_SHARE_ON_HUGE_PAGES = 0.9  # from which on the rest is not worth copying


class MappedFile:
    """The bytes of an open file from its beginning on, mapped at the beginning of a huge page: `memory`, uint8.

    They are this process's own: what is written to `memory` is not written to the file. Raises `OSError` where the file
    cannot be mapped, also on systems other than Linux.
    """

    def __init__(self, file: Path) -> None:
        if libc is None:
            raise OSError("files are mapped as weights on Linux only")
        self.file = file
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            num_bytes = os.fstat(self._fd).st_size
            if num_bytes == 0:
                raise OSError(f"{file} is empty")
            # The region frees its whole range of addresses with its last tensor, whatever is mapped there by then.
            self._region = map_region(num_bytes)
            self.memory = self._region[:num_bytes]
            self._map()
        except BaseException:  # raised on: nobody else closes it
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        os.close(self._fd)

    def populate(self) -> None:
        """Read what the page cache has not, and enter all pages in this process's table, where the system can do so ahead."""
        assert libc is not None
        for begin in range(0, len(self.memory), _PIECE_BYTES):
            address = self.memory.data_ptr() + begin
            size = min(_PIECE_BYTES, len(self.memory) - begin)
            if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_READ) != 0:
                return  # before Linux 5.14: pages come when they are read

    def is_on_huge_pages(self) -> bool:
        """Whether (nearly) all of it is mapped in huge pages: the page cache of some file systems consists of them."""
        first, mapped = self.memory.data_ptr(), 0
        last = first + len(self.memory)
        is_inside = False
        with suppress(OSError):
            for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
                name, _, value = line.partition(" ")
                if "-" in name and not name.endswith(":"):
                    begin, _, end = name.partition("-")
                    is_inside = int(begin, 16) >= first and int(end, 16) <= -(-last // mmap.PAGESIZE) * mmap.PAGESIZE
                elif is_inside and name in ("FilePmdMapped:", "AnonHugePages:"):
                    mapped += int(value.split()[0]) * 1024
        return mapped >= _SHARE_ON_HUGE_PAGES * len(self.memory)

    def move_to_huge_pages(self, stopping: threading.Event) -> bool:
        """Replace the mapped file by a copy on huge pages, piece by piece, until `stopping` is set; whether all of it was.

        A piece is read beside the mapping and then put into its place by one mremap(2), which readers see either before or
        after. Raises `OSError` where the system refuses, or memory is short; what was moved until then is.
        """
        for begin in range(0, len(self.memory), _PIECE_BYTES):
            if stopping.is_set():
                return False
            self._move(begin, min(_PIECE_BYTES, len(self.memory) - begin))
        return True

    def _map(self) -> None:
        assert libc is not None
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self.memory.data_ptr()
        mapped = libc.mmap(
            ctypes.c_void_p(address),
            ctypes.c_size_t(len(self.memory)),
            protection,
            mmap.MAP_PRIVATE | _MAP_FIXED,
            self._fd,
            ctypes.c_long(0),
        )
        if mapped == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"mmap of {self.file}: {os.strerror(number)}")
        # Files are read ahead in huge pages, then, where their system has them.
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(self.memory)), mmap.MADV_HUGEPAGE)

    def _move(self, begin: int, size: int) -> None:
        assert libc is not None
        piece = map_region(size)
        view = piece.numpy().data[:size]
        done = 0
        while done < size:
            count = os.preadv(self._fd, [view[done:]], begin + done)
            if count == 0:
                raise OSError(f"{self.file} has become shorter")
            done += count
        del view
        target = self.memory.data_ptr() + begin
        # Without its pages the piece stays mapped, or its addresses could be another's by the time that they are freed.
        moved = libc.mremap(
            ctypes.c_void_p(piece.data_ptr()),
            ctypes.c_size_t(len(piece)),
            ctypes.c_size_t(len(piece)),
            _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP,
            ctypes.c_void_p(target),
        )
        if moved == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"mremap: {os.strerror(number)}")


if libc is not None:
    libc.mmap.restype = ctypes.c_void_p
    libc.mremap.restype = ctypes.c_void_p
