"""Where a rank's weights come from: a file of packed ones that an earlier start has left, or the checkpoint.

What is left to do behind either is done while the engine serves, by a thread that goes last: packed weights are written to
the file, and those that were mapped from small pages are moved to huge ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pagoda.config.values import format_bytes
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.loader import LoadListener
from pagoda.models.loading.weight_cache import CachedWeights, WeightCacheError, WeightsToCache
from pagoda.models.loading.weight_cache_directory import WeightCacheDirectory
from pagoda.process_control import lower_thread_priority

logger = logging.getLogger(__name__)

_NICENESS = 10
_PAUSE_SECONDS = 2.0  # requests that have waited for the start go first


class WeightSource:
    """The weights of a rank with `key` (see `cache_key`) in `directory`."""

    def __init__(self, directory: WeightCacheDirectory, key: str) -> None:
        self._directory = directory
        self._key = key
        self._cached: CachedWeights | None = None
        self._model: DecoderForCausalLM | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def mapped_bytes(self) -> int:
        """Memory of weights that the system counts as page cache and therefore as available."""
        return 0 if self._cached is None else self._cached.nbytes

    @property
    def file(self) -> str | None:
        """What is mapped, if anything is."""
        return None if self._cached is None else str(self._cached.mapped.file)

    def load(
        self,
        build: Callable[[], DecoderForCausalLM],
        read: Callable[[DecoderForCausalLM], None],
        check: Callable[[], None],
        progress: LoadListener | None,
    ) -> DecoderForCausalLM:
        """The model that `build` gives, filled from the file, or by `read`; before that, `check`."""
        self._cached = cached = self._directory.open(self._key)
        if cached is not None:
            model = build()
            try:
                cached.fill(model)
            except WeightCacheError as error:
                self._directory.refuse(cached.mapped.file, error)
                self._close()
            else:
                logger.info("weights are mapped from %s (%s)", cached.mapped.file, format_bytes(cached.nbytes))
                if progress is not None:
                    progress(cached.mapped.file.name, cached.nbytes, cached.nbytes)
                return model
        check()
        model = build()
        read(model)
        self._model = model
        return model

    def finish(self) -> None:
        """The engine is as good as ready: begin with what is left."""
        self._thread = threading.Thread(target=self._work, name="weight-cache", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, with the piece it is at, and let go of the weights."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._close()
        self._model = None

    def _work(self) -> None:
        lower_thread_priority(_NICENESS)
        self._stopping.wait(_PAUSE_SECONDS)
        try:
            if self._cached is not None:
                self._move(self._cached)
            elif self._model is not None:
                self._directory.write(WeightsToCache(self._model, self._key), self._key, self._stopping)
        except WeightCacheError as error:
            logger.info("packed weights are not cached: %s", error)
        except Exception:  # any error: the engine has its weights, whatever happens here
            logger.exception("packed weights could not be cached")
        finally:
            self._model = None

    def _move(self, cached: CachedWeights) -> None:
        mapped, started = cached.mapped, time.monotonic()
        if mapped.is_on_huge_pages():
            return
        try:
            if mapped.move_to_huge_pages(self._stopping):
                logger.info("weights are on huge pages after %.1f s", time.monotonic() - started)
        except (OSError, MemoryError) as error:
            logger.info("weights stay on small pages: %s", error)

    def _close(self) -> None:
        if self._cached is not None:
            self._cached.mapped.close()
            self._cached = None
