"""Responses that may be continued: in memory, bounded in bytes and time, the least recently used one goes first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from pagoda.errors import ModelNotFoundError, shown

MAX_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Entry:
    data: bytes
    expires: float


class ResponseStore:
    """Whole responses with the messages that led to them, those of all tenants together in `max_bytes`.

    A process has a store of its own: behind several replicas a client sends its items again, as with `store: false`.
    Used from several threads, for large bodies are decoded beside the event loop.
    """

    def __init__(self, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def of(self, tenant: str) -> TenantResponses:
        """The responses of one tenant, who sees no others."""
        return TenantResponses(self, tenant)

    def put(self, key: tuple[str, str], data: bytes) -> None:
        """Keep `data` under `key`; nothing is kept that is larger than the store."""
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._forget(key)
            self._entries[key] = _Entry(data, self._clock() + MAX_SECONDS)
            self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._entries)))

    def get(self, key: tuple[str, str], *, forget: bool = False) -> bytes | None:
        """What is kept under `key`, None if it is not there, or no longer."""
        with self._lock:
            entry = self._entries.get(key)
            is_old = entry is not None and entry.expires < self._clock()
            if is_old or forget:
                self._forget(key)
            elif entry is not None:
                self._entries.move_to_end(key)
            return None if entry is None or is_old else entry.data

    def _forget(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        self._num_bytes -= 0 if entry is None else len(entry.data)


class TenantResponses:
    """The responses of one tenant."""

    def __init__(self, store: ResponseStore, tenant: str) -> None:
        self._store = store
        self._tenant = tenant

    def put(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keep `response`, and the conversation with it in `messages`."""
        data = orjson.dumps({"response": response, "messages": messages})
        self._store.put((self._tenant, response["id"]), data)

    def get(self, response_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A response and its conversation; raises `ModelNotFoundError` (404) for one that is not here, or no longer."""
        kept = orjson.loads(self._found(response_id, forget=False))
        return kept["response"], kept["messages"]

    def delete(self, response_id: str) -> None:
        """Forget a response; raises as `get` does."""
        self._found(response_id, forget=True)

    def _found(self, response_id: str, *, forget: bool) -> bytes:
        data = self._store.get((self._tenant, response_id), forget=forget)
        if data is None:
            raise ModelNotFoundError(
                f"there is no response {shown(response_id)} here: responses are kept in the memory of one server, for "
                f"{MAX_SECONDS:g} seconds at most; send the whole input instead"
            )
        return data
