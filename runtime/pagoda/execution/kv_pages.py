"""The memory of a CPU's KV cache: a first share before the engine is ready, the rest while it serves.

A system clears each page that it gives, gigabytes of them for seconds. Blocks are handed out from the first one on, so
requests use the first share while a thread takes the rest in the same order. A block that is written before the thread has
come to it takes its page itself. The thread begins behind the first step: whoever allocates memory waits for the piece that
is being cleared, and where all cores compute, for this thread's turn to end it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from pagoda.config.values import format_bytes
from pagoda.process_control import lower_thread_priority
from pagoda_kernels.huge_pages import populate

logger = logging.getLogger(__name__)

FIRST_SHARE_BYTES = 32 * 2**20
_PIECE_BYTES = 4 * 2**20  # at a time, after which the thread may be told to stop
_NICENESS = 10


class KVPages:
    """The pages of tensors `[num_blocks, ...]`, contiguous CPU memory that was never written."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._num_bytes = sum(tensor.nbytes for tensor in tensors)
        self._is_complete = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def populate_first(self) -> None:
        """Take the first blocks of all tensors, or all of them where only that is possible."""
        share = min(1.0, FIRST_SHARE_BYTES / max(1, self._num_bytes))
        try:
            for tensor in self._tensors:
                populate(tensor[: max(1, round(share * len(tensor)))])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise MemoryError(f"the first {format_bytes(FIRST_SHARE_BYTES)} of the KV cache: {error}") from error
            logger.info("all memory of the KV cache is taken at once: %s", error)
            for tensor in self._tensors:
                tensor.zero_()
            share = 1.0
        self._is_complete = share == 1

    def populate_rest(self) -> None:
        """Take the others, in a thread."""
        if not self._is_complete:
            self._thread = threading.Thread(target=self._populate_rest, name="kv-cache-pages", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, with the piece it is at."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _populate_rest(self) -> None:
        started = time.monotonic()
        lower_thread_priority(_NICENESS)
        try:
            for piece in self._pieces():
                if self._stopping.is_set():
                    return
                populate(piece)
        except OSError as error:
            logger.error(
                "the KV cache could not take all of its %s: %s; out of memory, requests may end with the engine killed: "
                "lower kv_cache_memory_bytes or raise the memory limit",
                format_bytes(self._num_bytes),
                error,
            )
            return
        logger.info(
            "the KV cache has all of its %s after %.1f s", format_bytes(self._num_bytes), time.monotonic() - started
        )

    def _pieces(self) -> Iterator[torch.Tensor]:
        """All tensors, piece by piece in the order of blocks."""
        num_pieces = max(1, *(-(-tensor.nbytes // _PIECE_BYTES) for tensor in self._tensors))
        for index in range(num_pieces):
            for tensor in self._tensors:
                size = -(-len(tensor) // num_pieces)
                piece = tensor[index * size : (index + 1) * size]
                if len(piece):
                    yield piece
