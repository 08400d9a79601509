"""Adapters are read in a thread beside the steps, and put into the model between two of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pagoda.adapters import LoraAdapter
from pagoda.config.values import format_bytes
from pagoda.errors import PagodaError
from pagoda.models.lora.weights import LoadedAdapter, LoraModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """What came of reading an adapter for a slot: its weights on this rank, or why there are none."""

    slot: int
    adapter: LoraAdapter
    loaded: LoadedAdapter | None
    error: str | None = None


class AdapterLoader:
    """Reads one adapter after the other. `on_read` is called in the thread that reads."""

    def __init__(self, model: LoraModel, on_read: Callable[[AdapterRead], None]) -> None:
        self._model = model
        self._on_read = on_read
        self._thread = ThreadPoolExecutor(1, "read-adapters")
        self._is_closed = threading.Event()

    def start(self, slot: int, adapter: LoraAdapter) -> None:
        """Begin to read an adapter."""
        self._thread.submit(self._read, slot, adapter)

    def install(self, read: AdapterRead) -> str | None:
        """Put what was read into its slot; returns why that is not possible. To be called between steps."""
        error = read.error
        if read.loaded is not None:
            try:
                self._model.install(read.slot, read.loaded)
            except Exception as failure:  # whatever it is, it concerns this adapter alone
                logger.exception("adapter %s could not be put into the model", read.adapter)
                error = f"adapter {read.adapter.name} could not be put into the model: {failure}"
            else:
                logger.info("adapter %s takes %s", read.adapter, format_bytes(read.loaded.num_bytes))
        if error is not None:
            self._model.remove(read.slot)
        return error

    def close(self) -> None:
        """Read nothing more."""
        self._is_closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, slot: int, adapter: LoraAdapter) -> None:
        loaded: LoadedAdapter | None = None
        error: str | None = None
        try:
            loaded = self._model.load(adapter)
        except PagodaError as failure:
            error = str(failure)
        except Exception as failure:  # a file can be broken in any way
            logger.exception("adapter %s could not be read", adapter)
            error = f"adapter {adapter.name} could not be read: {type(failure).__name__}: {failure}"
        if not self._is_closed.is_set():
            self._on_read(AdapterRead(slot, adapter, loaded, error))
