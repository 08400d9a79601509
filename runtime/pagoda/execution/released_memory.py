"""Giving memory back to the system: what was freed in this process, and files in the page cache."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

from pagoda_kernels.huge_pages import release_region


def give_back_memory() -> None:
    """Return to the system what Python and the allocator hold of memory that is free."""
    gc.unfreeze()
    gc.collect()
    release_region()
    with suppress(OSError, AttributeError):  # glibc's; other allocators return memory by themselves
        ctypes.CDLL(None).malloc_trim(0)


def forget_files(checkpoint: str | None) -> None:
    """Let the system drop the pages of a checkpoint's files, a directory's or a single one; nothing is lost."""
    if checkpoint is None or not hasattr(os, "posix_fadvise"):
        return
    path = Path(checkpoint)
    for file in [path] if path.is_file() else path.iterdir() if path.is_dir() else []:
        if file.is_file():
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
